"""TRL against us: the same batch by its losses and by ours, its options, the products of both."""
