"""What holds for all tests."""

import torch

# The models are tiny: more threads than one only wait for each other.
torch.set_num_threads(1)
