"""What all tests share."""

import signal

import torch

# Small tensors gain nothing from a second thread, and on a busy machine threads that wait for each other lose a lot.
torch.set_num_threads(1)

# A shell that starts the tests in the background, or nohup, lets them and all that they start ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
