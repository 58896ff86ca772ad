"""The README's table of settings, from the settings themselves. Print it: python -m tests.settings_table"""

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.api.settings import ApiSettings
from services.basic.settings import BasicSettings
from services.gateway.settings import GatewaySettings
from shared.settings import Settings

READERS: dict[str, type[Settings]] = {
    "API": ApiSettings,
    "gateway": GatewaySettings,
    "basic": BasicSettings,
}


def rows() -> list[str]:
    """A row for each variable: name, who reads it, default, what it may be."""
    readers: dict[str, dict[str, FieldInfo]] = {}
    for reader, settings in READERS.items():
        for field, info in settings.model_fields.items():
            readers.setdefault(field, {})[reader] = info
    table = []
    for field, infos in sorted(readers.items()):
        defaults = {reader: _default(info) for reader, info in infos.items()}
        shown = next(iter(defaults.values()))
        if len(set(defaults.values())) > 1:
            shown = "; ".join(
                f"{reader}: {default or 'none'}" for reader, default in defaults.items()
            )
        (description,) = {info.description for info in infos.values()}
        table.append(f"| `{field.upper()}` | {', '.join(infos)} | {shown} | {description} |")
    return table


def _default(info: FieldInfo) -> str:
    default = info.default
    if default is PydanticUndefined:
        return "required"
    if default in (None, ()):
        return ""
    return f"`{','.join(default) if isinstance(default, tuple) else _written(default)}`"


def _written(default: object) -> str:
    amount, window = getattr(default, "amount", None), getattr(default, "GRANULARITY", None)
    return f"{amount}/{window.name}" if amount and window else str(default)


if __name__ == "__main__":
    print("\n".join(rows()))
