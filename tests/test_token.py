"""Which tokens are believed: signed with our key, by our algorithm, of a user, not expired."""

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from shared.settings import SettingsError
from shared.token import TOKEN_BYTES_MAX, TokenSettings, TokenVerifier, Unauthorized, mint

SECRET = "a secret of more than thirty-two bytes"
LATER = 4_000_000_000


def verifier(**environ: str) -> TokenVerifier:
    """A verifier as a process with this environment would have it."""
    return TokenVerifier(TokenSettings.from_environ(environ))


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    """The public half, as an operator would give it."""
    return (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def part(value: Mapping[str, Any]) -> str:
    """One part of a token, made by hand."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_minted_token_says_who_and_until_when() -> None:
    """What `scoreboard token` prints is what the services believe."""
    claims = verifier(JWT_SECRET=SECRET).verify(mint(SECRET, "alice", 60))

    assert claims.subject == "alice"
    assert 55 < claims.expires_at - time.time() <= 60


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param({"exp": LATER}, id="no subject"),
        pytest.param({"sub": "a"}, id="no expiry"),
        pytest.param({"sub": "a", "exp": 1}, id="expired"),
        pytest.param({"sub": "a", "exp": str(LATER)}, id="expiry as text"),
        pytest.param({"sub": "a", "exp": [LATER]}, id="expiry as list"),
        pytest.param({"sub": "a", "exp": float("inf")}, id="endless"),
        pytest.param({"sub": "a", "exp": 10**400}, id="a number that no float holds"),
        pytest.param({"sub": "a", "exp": True}, id="expiry as boolean"),
        pytest.param({"sub": "a", "exp": LATER, "nbf": LATER - 1}, id="not yet"),
        pytest.param({"sub": 1, "exp": LATER}, id="subject as number"),
        pytest.param({"sub": ["a"], "exp": LATER}, id="subject as list"),
        pytest.param({"sub": "", "exp": LATER}, id="empty subject"),
        pytest.param({"sub": "a\0", "exp": LATER}, id="NUL in the subject"),
        pytest.param({"sub": "a" * 256, "exp": LATER}, id="long subject"),
    ],
)
def test_claims_that_are_not_believed(claims: dict[str, Any]) -> None:
    """However well they are signed."""
    with pytest.raises(Unauthorized):
        verifier(JWT_SECRET=SECRET).verify(jwt.encode(claims, SECRET, "HS256"))


@pytest.mark.parametrize("algorithm", ["none", "None", "nOnE"])
def test_an_unsigned_token_is_refused(algorithm: str) -> None:
    """The header does not choose the algorithm."""
    token = f"{part({'alg': algorithm})}.{part({'sub': 'a', 'exp': LATER})}."
    with pytest.raises(Unauthorized):
        verifier(JWT_SECRET=SECRET).verify(token)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "a",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "...",
        "é.é.é",
        "x" * (TOKEN_BYTES_MAX + 1),
        f"{'[' * 100000}.b.c",
        base64.b64encode(b"[" * 2000).decode() + ".b.c",
    ],
)
def test_what_is_no_token_is_refused(token: str) -> None:
    """Without a trace of why."""
    with pytest.raises(Unauthorized):
        verifier(JWT_SECRET=SECRET).verify(token)


def test_another_key_is_refused() -> None:
    """A signature is of one key."""
    with pytest.raises(Unauthorized):
        verifier(JWT_SECRET=SECRET).verify(mint("x" * 32, "alice", 60))


def test_another_algorithm_of_the_same_key_is_refused() -> None:
    """One algorithm a key."""
    token = jwt.encode({"sub": "a", "exp": LATER}, SECRET * 2, "HS512")
    with pytest.raises(Unauthorized):
        verifier(JWT_SECRET=SECRET * 2).verify(token)


def test_the_public_key_is_no_secret_of_hs256() -> None:
    """The classic confusion of the two kinds of keys."""
    public = pem(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    header, payload = part({"alg": "HS256", "typ": "JWT"}), part({"sub": "a", "exp": LATER})
    signed = jwt.get_algorithm_by_name("HS256").sign(
        f"{header}.{payload}".encode(), public.encode()
    )
    token = f"{header}.{payload}.{base64.urlsafe_b64encode(signed).rstrip(b'=').decode()}"
    with pytest.raises(Unauthorized):
        verifier(JWT_ALGORITHM="RS256", JWT_PUBLIC_KEY=public).verify(token)


def test_rs256_and_es256_with_a_key_file() -> None:
    """Each with the key it is for."""
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    ec_key = ec.generate_private_key(ec.SECP256R1())
    claims = {"sub": "a", "exp": LATER}

    by_rsa = verifier(JWT_ALGORITHM="RS256", JWT_PUBLIC_KEY=pem(rsa_key))
    by_ec = verifier(JWT_ALGORITHM="ES256", JWT_PUBLIC_KEY=pem(ec_key))
    assert by_rsa.verify(jwt.encode(claims, rsa_key, "RS256")).subject == "a"
    assert by_ec.verify(jwt.encode(claims, ec_key, "ES256")).subject == "a"
    with pytest.raises(SettingsError, match="JWT_PUBLIC_KEY must be a public key in PEM form"):
        verifier(JWT_ALGORITHM="ES256", JWT_PUBLIC_KEY=pem(rsa_key))


def test_audience_and_issuer_are_checked_where_configured() -> None:
    """And only there."""
    token = jwt.encode({"sub": "a", "exp": LATER, "aud": "board", "iss": "us"}, SECRET, "HS256")
    plain = jwt.encode({"sub": "a", "exp": LATER}, SECRET, "HS256")

    strict = verifier(JWT_SECRET=SECRET, JWT_AUDIENCE="board", JWT_ISSUER="us")
    assert strict.verify(token).subject == "a"
    assert verifier(JWT_SECRET=SECRET).verify(token).subject == "a"
    for wrong in (
        plain,
        jwt.encode({"sub": "a", "exp": LATER, "aud": "x", "iss": "us"}, SECRET, "HS256"),
    ):
        with pytest.raises(Unauthorized):
            strict.verify(wrong)


def test_a_believed_token_is_not_believed_after_it_expires() -> None:
    """Also where it was verified a moment before."""
    checker = verifier(JWT_SECRET=SECRET)
    token = mint(SECRET, "alice", 1)
    assert checker.verify(token).subject == "alice"
    with pytest.raises(Unauthorized):
        while True:
            checker.verify(token)

    assert time.time() >= expiry_of(token)


def expiry_of(token: str) -> float:
    """The time in the token."""
    expiry: float = jwt.decode(token, options={"verify_signature": False})["exp"]
    return expiry


def test_a_token_is_not_kept_in_memory() -> None:
    """Only its digest is."""
    checker = verifier(JWT_SECRET=SECRET)
    token = mint(SECRET, "alice", 60)
    checker.verify(token)

    assert token not in repr(vars(checker))


def test_a_token_that_differs_in_its_signature_is_another() -> None:
    """What is remembered of one is not believed of the other."""
    checker = verifier(JWT_SECRET=SECRET)
    token = mint(SECRET, "alice", 60)
    checker.verify(token)
    with pytest.raises(Unauthorized):
        checker.verify(token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"))
