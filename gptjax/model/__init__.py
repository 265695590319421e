"""The network: pure maths in `ops`, weights declared once in the modules that use them."""
