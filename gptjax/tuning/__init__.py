"""Evaluation on tasks: answers, metrics and confidence intervals."""
