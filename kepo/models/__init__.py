"""Models: loading, checking, encoding, states and samples."""
