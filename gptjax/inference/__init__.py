"""Text from a trained model, and what it makes of a text."""
