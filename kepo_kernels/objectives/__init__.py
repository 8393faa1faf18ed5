"""The policy objectives: plain PyTorch on the numbers of a token."""
