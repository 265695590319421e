"""Beyond the next token: tasks evaluated by their own metrics, and what is learnt from them."""
