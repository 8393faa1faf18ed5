"""The model families, one file each: everything that the rest must know about one of them."""
