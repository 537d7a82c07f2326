"""What all tests share."""

import signal

import torch
from tensorboard.summary.writer import event_file_writer

# Small tensors gain nothing from a second thread, and on a busy machine threads that wait for each other lose a lot.
torch.set_num_threads(1)

# TensorBoard reads files in the order of their names: the second, and then this number, which a test's second start of
# a run raises. With as many digits from the first on, that order is theirs.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

# A shell that starts the tests in the background, or nohup, lets them and all that they start ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
