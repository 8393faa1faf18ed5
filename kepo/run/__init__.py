"""The files a run keeps and writes: checkpoints, metrics, curves; and how a run begins and ends."""
