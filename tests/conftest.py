"""What all tests share."""

import torch

# Small tensors gain nothing from a second thread, and on a busy machine threads that wait for each other lose a lot.
torch.set_num_threads(1)
