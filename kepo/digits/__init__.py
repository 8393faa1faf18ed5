"""The demonstration: tiny models, made on the spot, add two scanned digits."""
