"""The bodies both services answer with; the contract fixes them to the byte."""

import json


def error_body(message: str) -> bytes:
    """``{"status":"error","message":message}``."""
    return json.dumps({"status": "error", "message": message}, separators=(",", ":")).encode()


UNAUTHORIZED = error_body("Unauthorized")
NOT_FOUND = error_body("Not found")
OVERLOADED = error_body("Service overloaded")

CHALLENGE = "Bearer"
"""The ``WWW-Authenticate`` of every 401 (RFC 6750)."""

RETRY_AFTER_OVERLOADED_S = 1
"""Seconds a refused client is asked to wait: by then a queue has drained or it is a real outage."""
