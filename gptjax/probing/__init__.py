"""Measurements of a trained model: what it can do, and what it has memorised."""
