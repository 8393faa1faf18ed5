"""Vision-language models: loading, checking, encoding, states and samples."""
