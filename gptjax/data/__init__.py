"""Text to batches: `corpus` reads, `tokenizer` encodes, `store` keeps tokens, `batches` deals them out."""
