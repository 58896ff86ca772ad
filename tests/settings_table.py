"""The README's table of settings, from the settings themselves. Print it: python -m tests.settings_table"""

from pydantic_core import PydanticUndefined

from services.api.settings import ApiSettings
from services.gateway.settings import GatewaySettings


def rows() -> list[str]:
    """A row for each variable: name, who reads it, default, what it may be."""
    readers: dict[str, list[str]] = {}
    for reader, settings in (("API", ApiSettings), ("gateway", GatewaySettings)):
        for field in settings.model_fields:
            readers.setdefault(field, []).append(reader)
    fields = {**GatewaySettings.model_fields, **ApiSettings.model_fields}
    table = []
    for field in sorted(fields):
        info = fields[field]
        default = info.default
        if default is PydanticUndefined:
            shown = "required"
        elif default in (None, ()):
            shown = ""
        elif isinstance(default, tuple):
            shown = f"`{','.join(default)}`"
        else:
            shown = f"`{_written(default)}`"
        table.append(
            f"| `{field.upper()}` | {', '.join(readers[field])} | {shown} | {info.description} |"
        )
    return table


def _written(default: object) -> str:
    amount, window = getattr(default, "amount", None), getattr(default, "GRANULARITY", None)
    return f"{amount}/{window.name}" if amount and window else str(default)


if __name__ == "__main__":
    print("\n".join(rows()))
