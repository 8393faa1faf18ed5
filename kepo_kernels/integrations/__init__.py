"""The losses in others' trainers. Each module imports its framework, and nothing imports it."""
