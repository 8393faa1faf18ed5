"""From files on disk to checked examples."""
