"""The basic approach: API and gateway in one process, on one PostgreSQL."""
