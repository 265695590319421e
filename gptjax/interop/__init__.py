"""Interoperability: models in the format of Hugging Face, and the evaluation harness of EleutherAI."""
