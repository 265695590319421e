"""Text from a trained model: the key/value cache and the sampler."""
