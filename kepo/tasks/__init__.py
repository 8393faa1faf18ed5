"""The task: its prompts, its rewards, and the rules for hints."""
