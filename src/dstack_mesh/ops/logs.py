"""Log events on stderr: one line each, as JSON or as text for people.

An event is what `dstack_mesh.log.event` makes. Records of libraries get the event `log_message`,
their text in the field `message`. Nothing that a field holds can break its line, and a failing
stderr (a full disk, a reader that went away) never disturbs the sidecar: the line is lost.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import traceback
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

REDACTED = "[redacted]"

_FIXED = ("ts", "level", "event", "logger")
_DEEPEST = 4
_BARE = re.compile(r"[!#-<>-~]+")
"""What a text field's value may be without quotes: printable ASCII but space, `"` and `=`."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: `ts` (RFC 3339, UTC), `level`, `event`, `logger`, fields.

    A field that has one of these four names is written as `field_NAME`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write `record` on one line; an exception's traceback is the field `exception`."""
        name, fields = _event(record)
        line: dict[str, object] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "event": name,
            "logger": record.name,
        }
        for key, value in fields.items():
            line[f"field_{key}" if key in _FIXED else key] = value
        if record.exc_info and record.exc_info[0]:
            line["exception"] = _clean("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """`time LEVEL event key=value …`; a traceback follows on lines that begin with ` | `."""

    def format(self, record: logging.LogRecord) -> str:
        """Write `record` on one line, and its traceback below it."""
        name, fields = _event(record)
        pairs = [f"{_word(key)}={_word(value)}" for key, value in fields.items()]
        lines = [" ".join([_timestamp(record), f"{record.levelname:<7}", _word(name), *pairs])]
        if record.exc_info and record.exc_info[0]:
            text = _clean("".join(traceback.format_exception(*record.exc_info)))
            lines += [f" | {_printable(line)}" for line in text.splitlines()]
        return "\n".join(lines)


class LineHandler(logging.Handler):
    """Writes each line to a file descriptor at once, unbuffered; errors are swallowed.

    A descriptor that does not block loses the line instead of waiting.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._line_is_open = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`; after a line that was cut short the next begins on a line of its own."""
        try:
            line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
            rest = memoryview(b"\n" + line if self._line_is_open else line)
            while rest:
                written = os.write(self._descriptor, rest)
                rest = rest[written:]
                self._line_is_open = bool(rest)
        except Exception:  # noqa: S110  # logging must not be what ends a request
            pass


def setup(format: Literal["json", "text"], level: str) -> None:  # noqa: A002  # the setting's name
    """Send all log records to stderr as `format`, ours from `level` up, others from warning up.

    May be called again, to change either.
    """
    handler = LineHandler(_stderr())
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    least = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, LineHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger("dstack_mesh").setLevel(least)
    logging.captureWarnings(capture=True)


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # none, replaced or closed
        return 2


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    fields = getattr(record, "fields", None)
    if isinstance(fields, dict):
        return _clean(str(record.msg)), {_clean(str(k)): _plain(v) for k, v in fields.items()}
    try:
        message = record.getMessage()
    except Exception:  # a library's own formatting mistake is no reason to be silent
        message = str(record.msg)
    return "log_message", {"message": _clean(message)}


def _plain(value: object, depth: int = 0) -> object:
    """Give `value` as what JSON has: numbers, text, lists and maps."""
    if value is None or isinstance(value, bool | int) or _is_finite(value):
        return value
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _clean(bytes(value).decode("utf-8", "backslashreplace"))
    if isinstance(value, Enum):
        return _plain(value.value, depth)
    if isinstance(value, BaseException):
        return _clean(f"{type(value).__name__}: {_text(value)}".removesuffix(": "))
    if depth < _DEEPEST:
        if isinstance(value, dict):
            return {_clean(_text(k)): _plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, set | frozenset):
            return list(_sorted(value, depth))
        if isinstance(value, list | tuple):
            return [_plain(item, depth + 1) for item in value]
    return _clean(_text(value))


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _sorted(values: set[object] | frozenset[object], depth: int) -> Iterator[object]:
    yield from sorted((_plain(item, depth + 1) for item in values), key=str)


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a broken __str__ must not lose the event
        return f"<{type(value).__name__}>"


def _clean(text: str) -> str:
    """Keep keys out, should one ever come this far: the last line of defence."""
    return REDACTED if "PRIVATE KEY" in text else text


def _word(value: object) -> str:
    if not isinstance(value, str):
        value = json.dumps(value)
        return value if _BARE.fullmatch(value) else json.dumps(value)
    if _BARE.fullmatch(value):
        return value
    return f'"{_printable(value)}"'


def _printable(text: str) -> str:
    """Escape what is not printable, and what ends a quoted value."""
    return "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in text)


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1] if ord(char) != 0x7F else "\\u007f"
