"""What is made sure of before a release: kernels for every GPU, every Triton, torch and Python."""
