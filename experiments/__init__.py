"""Methods against each other on the scanned digits; not part of the installed package."""
