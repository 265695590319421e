"""Doors to what others have built: weights in the format of Hugging Face, the evaluation harness of EleutherAI."""
