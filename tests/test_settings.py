"""Settings: typed, from the environment or files, refused with the variable's name."""

from pathlib import Path

import pytest

from services.api.settings import ApiSettings
from services.gateway.settings import GatewaySettings
from shared.settings import SettingsError

GOOD = {
    "JWT_SECRET": "a secret of more than thirty-two bytes",
    "SHARD_URLS": "postgresql://u:p@a/x, postgresql://u:p@b/x",
    "REDIS_URL": "redis://:p@127.0.0.1:6379/0",
}


def test_lists_and_quotas_are_read() -> None:
    """From the notation that the README gives."""
    settings = ApiSettings.from_environ({**GOOD, "UPDATE_RATE_LIMIT": "7/minute"})

    assert settings.shard_urls == ("postgresql://u:p@a/x", "postgresql://u:p@b/x")
    assert (settings.update_rate_limit.amount, settings.update_rate_limit.get_expiry()) == (7, 60)
    assert (settings.top_rate_limit.amount, settings.top_rate_limit.get_expiry()) == (100, 3600)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "0"),
        ("UPDATE_RATE_LIMIT", "a lot"),
        ("TOP_RATE_LIMIT", ""),
        ("SCORE_INCREMENT_MAX", "0"),
        ("OPERATION_RETENTION", "86399"),
        ("OPERATION_RETENTION", "23h"),
        ("OPERATION_RETENTION", "0d"),
        ("OPERATION_RETENTION", "a day"),
        ("LOG_LEVEL", "loud"),
        ("REDIS_URL", "127.0.0.1"),
        ("SHARD_URLS", ""),
        ("SHARD_URLS", "mysql://a"),
        ("TRUSTED_PROXIES", "nginx"),
        ("JWT_SECRET", "short"),
        ("JWT_ALGORITHM", "none"),
        ("JWT_JWKS_URL", "file:///etc/passwd"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    """And says what the variable may be."""
    with pytest.raises(SettingsError, match=f"^{name} must be .+") as refusal:
        ApiSettings.from_environ({**GOOD, name: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALLOWED_ORIGINS", "scores.example"),
        ("ALLOWED_ORIGINS", "https://scores.example/"),
        ("CONNECTIONS_MAX", "0"),
        ("CONNECTIONS_PER_USER_MAX", "many"),
        ("CONNECTIONS_PER_ADDRESS_MAX", "0"),
        ("HANDSHAKES_PER_SECOND_MAX", "0"),
        ("HANDSHAKES_PER_SECOND_MAX", "inf"),
        ("COMPRESSION", "gzip"),
        ("DRAIN_SECONDS", "-1"),
        ("OPERATIONS_PORT", "80000"),
        ("REDIS_URL", "cluster://a"),
    ],
)
def test_a_gateway_s_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    """The same for what only the gateway reads."""
    environ = {key: GOOD[key] for key in ("JWT_SECRET", "REDIS_URL")}
    with pytest.raises(SettingsError, match=f"^{name} must be .+"):
        GatewaySettings.from_environ({**environ, name: value})
    GatewaySettings.from_environ({**environ, "REDIS_URL": "redis+cluster://:p@a:6379,b"})


def test_a_retention_has_a_unit_or_is_in_seconds() -> None:
    """A day if nothing is said: what is promised for a key."""
    for given, seconds in {"36h": 129_600, "7d": 604_800, "90000": 90_000, "1440m": 86_400}.items():
        settings = ApiSettings.from_environ({**GOOD, "OPERATION_RETENTION": given})
        assert settings.operation_retention == seconds
    assert ApiSettings.from_environ(GOOD).operation_retention == 86_400


def test_operations_are_kept_as_long_as_the_quota_counts() -> None:
    """Without Redis the quota of updates is counted from them; that of reads is not."""
    monthly = {**GOOD, "UPDATE_RATE_LIMIT": "100/month"}
    with pytest.raises(
        SettingsError, match=r"^OPERATION_RETENTION must be at least 2592000 seconds"
    ):
        ApiSettings.from_environ(monthly)
    ApiSettings.from_environ({**monthly, "OPERATION_RETENTION": "30d"})
    ApiSettings.from_environ({**GOOD, "TOP_RATE_LIMIT": "100/month"})


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_variable_is_refused_by_name(name: str) -> None:
    """There is no default secret and no default server."""
    with pytest.raises(SettingsError, match=f"^{name} is not set"):
        ApiSettings.from_environ({key: value for key, value in GOOD.items() if key != name})


def test_an_unknown_variable_is_refused_by_name() -> None:
    """Whoever writes SCOREBOARD_ means this project; what it means is no setting of a replica."""
    with pytest.raises(
        SettingsError, match=r"^SCOREBOARD_PORT is not a setting of this version\.$"
    ):
        ApiSettings.from_environ({**GOOD, "SCOREBOARD_PORT": "8080"})


def test_no_error_shows_a_secret() -> None:
    """Errors end up in logs."""
    for name, value in {
        "JWT_SECRET": "hunter2",
        "REDIS_URL": "x:hunter2@",
        "SHARD_URLS": "hunter2",
    }.items():
        with pytest.raises(SettingsError) as refusal:
            ApiSettings.from_environ({**GOOD, name: value})
        assert "hunter2" not in str(refusal.value)


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    """Without the newline that editors leave."""
    file = tmp_path / "secret"
    file.write_text(GOOD["JWT_SECRET"] + "\n")
    environ = {**GOOD, "JWT_SECRET_FILE": str(file)}
    with pytest.raises(SettingsError, match="JWT_SECRET and JWT_SECRET_FILE are both set"):
        ApiSettings.from_environ(environ)
    del environ["JWT_SECRET"]

    assert ApiSettings.from_environ(environ).jwt_secret == GOOD["JWT_SECRET"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With the system's own words."""
    with pytest.raises(SettingsError, match=r"^REDIS_URL_FILE: cannot read .*: No such file"):
        ApiSettings.from_environ({"REDIS_URL_FILE": str(tmp_path / "absent")})
