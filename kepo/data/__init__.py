"""Read datasets from disk and check their examples."""
