"""What a run keeps and writes: checkpoints, metrics, curves; and how it begins and ends."""
