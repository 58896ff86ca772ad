"""Who is asking: a JWT becomes a user id and a time until which it may be believed.

A key has one algorithm, fixed by the settings; the token's header never chooses it (RFC 8725,
section 3.1). Verification is synchronous and does no I/O, so it fits a WebSocket handshake; where
the keys come from a JWKS, :meth:`KeySet.follow` fetches them beside it.
"""

import asyncio
import time
from collections.abc import Mapping
from hashlib import blake2b
from http.client import HTTPException
from typing import Annotated, Any, Literal, NamedTuple, Self

import jwt
import structlog
from pydantic import Field, StringConstraints, model_validator

from shared.settings import Settings
from shared.user_id import is_user_id

TOKEN_BYTES_MAX = 6144
"""A longer token is refused unread. The longest user id alone makes 4,080: 255 characters of 12
bytes, as JSON escapes them, in base64. Usual ones have 200, with RS256 600."""

SECRET_BYTES_MIN = 32
"""The hash's own size, the least RFC 7518 section 3.2 allows for HS256."""

BELIEVED_S = 60.0
"""A token that was verified is believed until it expires, 1 µs instead of 50; where the keys are
fetched only so long, because a key may be withdrawn."""

BELIEVED_MAX = 50_000
"""Tokens believed at a time, 20 to 30 MB; the oldest is forgotten for the one beyond."""

DIGEST_BYTES = 16
"""So that nobody finds a second token with the digest of another."""

EXPIRY_MAX = 253_402_300_799
"""The last second of the year 9999: beyond it stand only numbers that some reader cannot hold."""

JWKS_REFRESH_S = 300.0
"""Between two fetches of the key set: how long a withdrawn key may still be believed."""

JWKS_COOLDOWN_S = 30.0
"""The least time between two fetches, so that tokens with made-up key ids cause no flood."""

JWKS_TIMEOUT_S = 5.0

log = structlog.get_logger()


class Unauthorized(Exception):
    """There is no valid token. Carries no reason on purpose: the client learns nothing from it."""


class Claims(NamedTuple):
    """What a valid token says.

    Attributes:
        subject: The user id.
        expires_at: Unix time in seconds.
    """

    subject: str
    expires_at: float


_NOTHING_KNOWN = (0.0, Claims(subject="", expires_at=0.0))


class TokenSettings(Settings):
    """How tokens are checked; mixed into the settings of each replica."""

    jwt_algorithm: Literal["HS256", "RS256", "ES256"] = Field(
        "HS256", description="one of HS256, RS256, ES256"
    )
    jwt_secret: Annotated[str, StringConstraints(min_length=SECRET_BYTES_MIN)] | None = Field(
        None, repr=False, description=f"a secret of at least {SECRET_BYTES_MIN} bytes (HS256)"
    )
    jwt_public_key: str | None = Field(
        None,
        pattern="^-----BEGIN ",
        repr=False,
        description="a public key in PEM form (RS256, ES256)",
    )
    jwt_jwks_url: str | None = Field(
        None,
        pattern="^https?://",
        description="the http(s) URL of a JSON Web Key Set (RS256, ES256)",
    )
    jwt_audience: str | None = Field(
        None, min_length=1, description="the audience a token must name"
    )
    jwt_issuer: str | None = Field(None, min_length=1, description="the issuer a token must name")

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        symmetric = self.jwt_algorithm == "HS256"
        if symmetric and self.jwt_secret is None:
            raise ValueError("JWT_SECRET is not set; it must be a secret of at least 32 bytes.")
        if symmetric and (self.jwt_public_key or self.jwt_jwks_url):
            raise ValueError("JWT_ALGORITHM must be RS256 or ES256 where a public key is set.")
        if not symmetric and self.jwt_secret is not None:
            raise ValueError("JWT_ALGORITHM must be HS256 where JWT_SECRET is set.")
        if not symmetric and (self.jwt_public_key is None) == (self.jwt_jwks_url is None):
            raise ValueError(
                f"JWT_PUBLIC_KEY or JWT_JWKS_URL, exactly one, must be set for {self.jwt_algorithm}."
            )
        if self.jwt_public_key is not None:
            self._check_public_key()
        return self

    def _check_public_key(self) -> None:
        try:
            jwt.get_algorithm_by_name(self.jwt_algorithm).prepare_key(self.jwt_public_key)
        except (jwt.InvalidKeyError, ValueError, TypeError):
            raise ValueError(
                f"JWT_PUBLIC_KEY must be a public key in PEM form for {self.jwt_algorithm}."
            ) from None


class KeySet:
    """The keys of a JWKS, by key id; empty until the first fetch."""

    def __init__(self, url: str, algorithm: str) -> None:
        self._client = jwt.PyJWKClient(url, timeout=JWKS_TIMEOUT_S, cache_jwk_set=False)
        self._algorithm = algorithm
        self._keys: Mapping[str | None, Any] = {}
        self._unknown_seen = asyncio.Event()

    def __getitem__(self, key_id: str | None) -> Any:
        """The key with that id; a token without an id may use the set's only key."""
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if key_id not in self._keys:
            self._unknown_seen.set()
            raise Unauthorized
        return self._keys[key_id]

    async def follow(self) -> None:
        """Fetch the set now, then regularly, and early when a token names a key not in it."""
        while True:
            try:
                fetched = await asyncio.to_thread(self._client.get_jwk_set)
            except (jwt.PyJWTError, HTTPException, ValueError, OSError) as error:
                # The last good set stays: an issuer that is away, or answers with something else,
                # must not log everyone out.
                log.warning("jwks.unavailable", error=str(error))
            else:
                self._keys = {
                    key.key_id: key.key
                    for key in fetched.keys
                    if key.algorithm_name == self._algorithm and key.public_key_use in (None, "sig")
                }
            self._unknown_seen.clear()
            await asyncio.sleep(JWKS_COOLDOWN_S)
            try:
                async with asyncio.timeout(JWKS_REFRESH_S - JWKS_COOLDOWN_S):
                    await self._unknown_seen.wait()
            except TimeoutError:
                continue


class TokenVerifier:
    """Checks tokens as the settings say.

    Attributes:
        key_set: To be followed by a task of the process where the settings name a JWKS.
    """

    def __init__(self, settings: TokenSettings) -> None:
        self.key_set = (
            KeySet(settings.jwt_jwks_url, settings.jwt_algorithm) if settings.jwt_jwks_url else None
        )
        self._key = settings.jwt_secret or settings.jwt_public_key
        self._algorithm = settings.jwt_algorithm
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer
        # By digest: until when, and what it says.
        self._believed: dict[bytes, tuple[float, Claims]] = {}

    def verify(self, token: str) -> Claims:
        """
        Check signature, expiry, subject, and audience and issuer where they are configured.

        Raises:
            Unauthorized: If any of it fails, always alike.
        """
        if not 0 < len(token) <= TOKEN_BYTES_MAX:
            raise Unauthorized
        now = time.time()
        # Under its digest: a token in memory is a token in a core dump.
        digest = blake2b(token.encode(errors="replace"), digest_size=DIGEST_BYTES).digest()
        until, claims = self._believed.get(digest, _NOTHING_KNOWN)
        if now < until:
            return claims
        self._believed.pop(digest, None)
        claims = self._check(token)
        if len(self._believed) >= BELIEVED_MAX:
            del self._believed[next(iter(self._believed))]
        until = claims.expires_at if self.key_set is None else now + BELIEVED_S
        self._believed[digest] = min(until, claims.expires_at), claims
        return claims

    def _check(self, token: str) -> Claims:
        try:
            payload = jwt.decode(
                token,
                self._key_of(token),
                algorithms=[self._algorithm],
                audience=self._audience,
                issuer=self._issuer,
                options={
                    "require": ["exp", "sub"],
                    "verify_aud": self._audience is not None,
                    "enforce_minimum_key_length": True,
                },
            )
        # PyJWT lets through what int() makes of a strange `exp`, and json of a deep nesting.
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            log.debug("token.refused", error=repr(error))
            raise Unauthorized from None
        subject, expires_at = payload["sub"], payload["exp"]
        if not is_user_id(subject) or type(expires_at) not in (int, float):
            raise Unauthorized
        if expires_at > EXPIRY_MAX:
            raise Unauthorized
        return Claims(subject=subject, expires_at=expires_at)

    def _key_of(self, token: str) -> Any:
        if self.key_set is None:
            return self._key
        return self.key_set[jwt.get_unverified_header(token).get("kid")]


def mint(secret: str, subject: str, ttl_s: float, now: float | None = None) -> str:
    """An HS256 token for development and tests; the project issues none to users."""
    issued_at = int(time.time() if now is None else now)
    return jwt.encode(
        {"sub": subject, "iat": issued_at, "exp": issued_at + ttl_s}, secret, algorithm="HS256"
    )
