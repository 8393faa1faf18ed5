"""The planner: it tells how much memory a run will hold, without running it."""
