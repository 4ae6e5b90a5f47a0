"""Settings of every test: one thread, because the number of threads changes the last digits."""

import torch

torch.set_num_threads(1)
