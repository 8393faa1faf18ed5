"""Several processes as one run: decisions, shared work, sharded models, a watchdog."""
