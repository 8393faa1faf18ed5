"""From completions to gradients: advantages, gates, the batch, one step."""
