"""The medical miniature: tiny models answer questions about pieces of one average brain."""
