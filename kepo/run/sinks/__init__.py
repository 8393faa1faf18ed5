"""Where a run's records go beside its own files: a tracker by name, or a sink of the user's own."""
