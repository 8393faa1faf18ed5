"""What is asked, what counts as right, and what a hint may say."""
