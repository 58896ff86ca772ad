"""What the services agree on: the board, tokens, settings, logs and operations endpoints."""
