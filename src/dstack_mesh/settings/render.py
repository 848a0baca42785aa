"""The effective settings as TOML or JSON, each value with its source; the table as Markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dstack_mesh.settings import rules
from dstack_mesh.settings.load import Loaded, value_of
from dstack_mesh.settings.schema import SCHEMA, Setting

if TYPE_CHECKING:
    from collections.abc import Iterator


def as_toml(loaded: Loaded) -> str:
    """Write a file that, loaded again, gives the same settings; sources are comments."""
    return "\n".join(_toml_lines(loaded)) + "\n"


def as_json(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Give each key's `value` (None is unset; rules and routes are lists) and `source`."""
    found: dict[str, dict[str, Any]] = {
        setting.key: {
            "value": _plain(setting, value_of(loaded.settings, setting.key)),
            "source": str(loaded.sources[setting.key]),
        }
        for setting in SCHEMA
    }
    for key in rules.TABLES:
        value = [rules.plain(one) for one in value_of(loaded.settings, key)]
        found[key] = {"value": value, "source": str(loaded.sources[key])}
    return found


def as_markdown() -> str:
    """Write the table of all settings for the documentation."""
    rows = [
        "| TOML | environment | flag | default | accepted | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for setting in SCHEMA:
        default = f"`{setting.default}`" if setting.default is not None else setting.when_unset
        cells = (
            f"`{setting.key}`",
            ", ".join(f"`{name}`" for name in setting.env),
            f"`{setting.flag}`",
            default,
            setting.kind.accepts,
            setting.help,
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _toml_lines(loaded: Loaded) -> Iterator[str]:
    section = ""
    # Keys of no table come first: in TOML they cannot follow one.
    for setting in sorted(SCHEMA, key=lambda setting: "." in setting.key):
        table, _, name = setting.key.rpartition(".")
        if table != section:
            section = table
            yield ""
            yield f"[{table}]"
        value = _plain(setting, value_of(loaded.settings, setting.key))
        source = loaded.sources[setting.key]
        if value is None:
            yield f"# {name}: {setting.when_unset}  # {source}"
        else:
            # A JSON string is a TOML basic string where it is printable, as all values are.
            yield f"{name} = {json.dumps(value, ensure_ascii=False)}  # {source}"
    for key in rules.TABLES:
        yield from rules.toml_lines(key, value_of(loaded.settings, key), str(loaded.sources[key]))


def _plain(setting: Setting, value: Any) -> str | int | None:
    if setting.kind.number and isinstance(value, int):
        return value
    return setting.text(value)
