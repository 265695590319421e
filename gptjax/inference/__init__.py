"""Text from a trained model, and the scores that it gives to texts."""
