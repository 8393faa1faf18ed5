"""The policy objectives: plain PyTorch on the per-token numbers."""
