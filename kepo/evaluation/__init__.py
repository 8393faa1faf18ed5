"""Accuracy of a model on held-out questions, with intervals."""
