"""What is wrong with the settings, in one line for the person who wrote them."""

from __future__ import annotations

import json

_LONGEST_SHOWN = 80


class SettingsError(Exception):
    """Settings that cannot be used; the process ends with exit status 2.

    The message is one line: the key as its writer named it, the value, and what is accepted.
    """


def shown(value: object) -> str:
    """Write a value for an error's line: quoted, on one line, shortened, and never a key."""
    text = value if isinstance(value, str) else repr(value)
    if "PRIVATE KEY" in text:
        return "[redacted]"
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[: _LONGEST_SHOWN - 3]}..."
    return json.dumps(text) if isinstance(value, str) else text


def one_line(text: str) -> str:
    """Give `text` with whatever would break a line or a terminal escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]
