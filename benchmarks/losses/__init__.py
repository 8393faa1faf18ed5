"""The losses: their problems and rivals, the bare products, how a call is timed."""
