"""Settings from the environment: typed, checked at start, refused with the name of the variable.

A process declares what it needs as a subclass of :class:`Settings` and reads it once, in its
composition root. Every variable ``NAME`` may instead be given as ``NAME_FILE``, the path of a file
that holds the value: that is how secrets arrive.
"""

import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from limits import RateLimitItem, parse
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

COMMAND_PREFIX = "SCOREBOARD_"
"""Of what `scoreboard up` and the compose file read. No replica reads a variable of that name, so
one that is given to it is a setting somebody got wrong."""


class SettingsError(Exception):
    """A variable is missing or has a value it may not have; the text is one line for a person."""


class Settings(BaseModel):
    """The base of each process's settings: the field ``redis_url`` is the variable ``REDIS_URL``.

    A field's description says what the variable may be; errors and the README's table quote it.
    A field marked ``repr=False`` is secret: no error shows its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read every field from ``environ``.

        Raises:
            SettingsError: On the first variable that is unknown, missing, unreadable or wrong.
        """
        if unknown := sorted(name for name in environ if name.startswith(COMMAND_PREFIX)):
            raise SettingsError(f"{unknown[0]} is not a setting of this version.")
        values = {
            field: value
            for field in cls.model_fields
            if (value := _read(field.upper(), environ)) is not None
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError(_sentence(cls, error.errors(include_url=False)[0])) from None


def _read(name: str, environ: Mapping[str, str]) -> str | None:
    """The variable's value, or that of the file it names; None where neither is set."""
    path = environ.get(f"{name}_FILE")
    if path is None:
        return environ.get(name)
    if name in environ:
        raise SettingsError(f"{name} and {name}_FILE are both set; keep one.")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{name}_FILE: cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}_FILE: {path} is not UTF-8 text.") from None


def _sentence(cls: type[Settings], error: ErrorDetails) -> str:
    if not error["loc"]:  # A rule between several variables names them itself.
        return error["msg"].removeprefix("Value error, ")
    field = str(error["loc"][0])
    info = cls.model_fields[field]
    if error["type"] == "missing":
        return f"{field.upper()} is not set; it must be {info.description}."
    given = f", not {error['input']!r}" if info.repr else ""
    return f"{field.upper()} must be {info.description}{given}."


def exit_with(error: Exception) -> NoReturn:
    """End the process as an operator expects of a wrong start: one sentence, status 1."""
    sys.stderr.write(f"{error}\n")
    raise SystemExit(1)


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _rate(value: object) -> object:
    return parse(value) if isinstance(value, str) else value


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """
    Read ``90s``, ``30m``, ``24h``, ``7d`` as seconds.

    Raises:
        ValueError: If it is not like that, with at most nine digits and more than nothing.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise ValueError(f"{text} is not a number with s, m, h or d, such as 90s or 1h.")
    return int(match[1]) * _UNITS[match[2]]


def _duration(value: object) -> object:
    return seconds(value) if isinstance(value, str) and value[-1:] in _UNITS else value


Listed = BeforeValidator(_split)
"""A comma-separated variable."""

Rate = Annotated[RateLimitItem, BeforeValidator(_rate)]
"""A quota in the notation of `limits`: ``100/hour``, ``10 per 5 minutes``."""

Duration = Annotated[int, BeforeValidator(_duration)]
"""Seconds, as such or with a unit: ``86400``, ``24h``."""

Network = Annotated[str, AfterValidator(lambda value: str(ipaddress.ip_network(value)))]


class ProcessSettings(Settings):
    """What every process listens on, says and believes."""

    host: str = Field("127.0.0.1", description="an address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="a port from 1 to 65535")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="one of debug, info, warning, error"
    )
    trusted_proxies: Annotated[tuple[Network, ...], Listed] = Field(
        ("127.0.0.1/32", "::1/128"),
        description="comma-separated networks whose X-Real-IP and X-Request-ID are believed",
    )


class RedisSettings(Settings):
    """Where Redis is."""

    redis_url: str = Field(
        pattern=r"^rediss?(\+cluster)?://",
        repr=False,
        description="a URL such as redis://:password@host:6379/0, or redis+cluster://…",
    )


class ReplicaSettings(ProcessSettings, RedisSettings):
    """What every replica of a cluster listens on, says, believes and publishes through."""
