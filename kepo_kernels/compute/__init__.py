"""The chunk loop: products, row kernels and gradients, in chunks that fit in memory."""
