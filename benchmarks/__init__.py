"""What a loss and a whole step cost, beside other ways to the same numbers."""
