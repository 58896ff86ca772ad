"""The WebSocket gateway: shows every client the newest board, and keeps nothing else."""
