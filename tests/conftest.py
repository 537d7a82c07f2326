"""What all tests share."""

import torch

import utils_config

# Small tensors gain nothing from a second thread, and on a busy machine threads that wait for each other lose a lot.
# Whole runs set as many as there are cores: here that is one.
torch.set_num_threads(1)
utils_config.cores = lambda: 1
