"""The corpus: hostile messages, each with what must become of it, read from two tables of text.

A table is made of lines `name | sent | passed on | told`, under headings that name the rule of
docs/http.md which they are about:

    ## request-lengths-both

    cl-te | POST / HTTP/1.1\\r\\nHost: a\\r\\n... | - | 400 bad_request

The columns of bytes are written as in Python's bytes literals (`\\r`, `\\x7f`, `\\\\`);
`\\x7c` is a bar, `-` is nothing at all, and `{x*5}` is `x` five times. Lines that begin with `# `,
and lines of just `#`, are comments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([rnt\\]))")
_REPEAT = re.compile(r"\{((?:\\x[0-9a-fA-F]{2}|\\.|[^\\*{}])+)\*([0-9]+)\}")
_NAMED = {"r": b"\r", "n": b"\n", "t": b"\t", "\\": b"\\"}


@dataclass(frozen=True)
class Message:
    """One row."""

    rule: str
    """The rule of docs/http.md that it is about."""
    name: str
    sent: bytes
    passed_on: bytes
    """All that goes on to the other side, byte for byte."""
    told: str
    """What becomes of the connections; each table's runner says how to read it."""
    line: int

    @property
    def id(self) -> str:
        """Rule and name, as `pytest -k` finds them."""
        return f"{self.rule}/{self.name}"


def requests() -> list[Message]:
    """Give the rows of the table of requests."""
    return _read(_HERE / "requests.txt")


def responses() -> list[Message]:
    """Give the rows of the table of responses."""
    return _read(_HERE / "responses.txt")


def _read(path: Path) -> list[Message]:
    rule = ""
    rows: dict[str, Message] = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        if line.startswith("## "):
            rule = line[3:].strip()
        elif line and line != "#" and not line.startswith("# "):
            columns = [column.strip(" ") for column in line.split(" | ")]
            if len(columns) != 4 or not rule:
                raise ValueError(f"{path.name}:{number}: not `name | sent | passed on | told`")
            name, sent, passed_on, told = columns
            row = Message(rule, name, unescape(sent), unescape(passed_on), told, number)
            if row.id in rows:
                raise ValueError(f"{path.name}:{number}: {row.id} is there twice")
            rows[row.id] = row
    return list(rows.values())


def unescape(text: str) -> bytes:
    """Turn a column into the bytes that it stands for."""
    if text == "-":
        return b""
    expanded = _REPEAT.sub(lambda match: match[1] * int(match[2]), text)
    out, at = b"", 0
    for match in _ESCAPE.finditer(expanded):
        out += _plain(expanded[at : match.start()])
        out += bytes([int(match[1], 16)]) if match[1] else _NAMED[match[2]]
        at = match.end()
    return out + _plain(expanded[at:])


def _plain(text: str) -> bytes:
    if "\\" in text:
        raise ValueError(f"an escape that is none: {text!r}")
    return text.encode("ascii")
