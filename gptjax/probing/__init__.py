"""What a trained model can do and what it keeps, measured from outside."""
