"""What the demonstrations share: tiny models, their supervised training, stages that are kept."""
