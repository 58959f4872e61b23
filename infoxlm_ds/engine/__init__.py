"""The only part of the project that knows DeepSpeed."""

import os

import torch

# Set before DeepSpeed is imported: at import it guesses the device, and warns if there is no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
