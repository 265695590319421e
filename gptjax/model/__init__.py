"""The network: pure functions in `ops`, and modules that declare their weights once."""
