"""A comparison of methods on the scanned digits; not part of the installed package."""
