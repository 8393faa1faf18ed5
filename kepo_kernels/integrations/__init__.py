"""The losses in others' trainers: a module each, which imports its framework when it is imported."""
