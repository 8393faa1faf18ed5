"""The suite for a machine with a CUDA device: is it right, and how fast is it."""
