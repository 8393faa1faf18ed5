"""How much memory a run will hold, said without running it."""
