"""Writing files that outlast a power cut, and reading files that may be anything."""
