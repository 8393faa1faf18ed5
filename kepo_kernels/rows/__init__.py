"""The row kernels: one contract, three back-ends."""
