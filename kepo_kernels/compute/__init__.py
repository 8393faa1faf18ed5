"""The chunk loop: products, row kernels and gradients, in pieces that fit the memory."""
