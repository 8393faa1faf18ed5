"""The path from completions to gradients: advantages, gates, the batch, one step."""
