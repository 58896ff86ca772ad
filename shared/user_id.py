"""What may be a user id: 1 to 255 characters that PostgreSQL can store, compared as they are.

No normalisation: two ids that look alike are two users unless their bytes are the same.
"""

USER_ID_LENGTH_MAX = 255
"""Characters, not bytes: the column is VARCHAR(255)."""


def is_user_id(value: object) -> bool:
    """Whether ``value`` can be a user's id: text without NUL and without lone surrogates."""
    if not isinstance(value, str) or not 1 <= len(value) <= USER_ID_LENGTH_MAX or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
