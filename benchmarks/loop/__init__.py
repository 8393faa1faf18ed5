"""A whole training step: its phases, and other ways to the same gradient."""
