"""Reads the arguments of a guest agent call, and complains in the words of the real agent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from collections.abc import Mapping


class CallError(Exception):
    """A call that the agent answers with status 400 and `{"error": …}`."""


class Type(Enum):
    """What an argument holds; bytes are hex in both forms of a call."""

    TEXT = "a string"
    FLAG = "a boolean"
    SECONDS = "u64"
    TEXTS = "a sequence"
    HEX = "hex"


Spec = dict[str, Type]


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments given, by name; each getter has the default that protobuf gives."""

    values: Mapping[str, object]

    def text(self, name: str, default: str = "") -> str:
        """Return the text, or `default` where there is none or it is empty."""
        value = self.values.get(name)
        return value if isinstance(value, str) and value else default

    def flag(self, name: str) -> bool:
        """Return the flag, false where it is absent."""
        return self.values.get(name) is True

    def seconds(self, name: str) -> int | None:
        """Return seconds since 1970, None where absent."""
        value = self.values.get(name)
        return value if isinstance(value, int) else None

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the list of texts, empty where absent."""
        value = self.values.get(name)
        return tuple(value) if isinstance(value, list) else ()

    def data(self, name: str) -> bytes:
        """Return the bytes, empty where absent."""
        value = self.values.get(name)
        return value if isinstance(value, bytes) else b""


def from_query(query: str, spec: Spec) -> Arguments:
    """Read the query of a GET. A list can't be given this way. Raises `CallError`."""
    values: dict[str, object] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        kind = spec.get(name)
        if kind is None:
            continue
        if name in values:
            raise CallError(f'Multiple values for one key: "{name}"')
        values[name] = _from_text(text, kind)
        if kind is Type.TEXTS:
            values[name] = text
    for name, value in values.items():
        if spec[name] is Type.TEXTS:
            raise CallError(f"invalid type: string {json.dumps(value)}, expected a sequence")
    return Arguments(values)


def _from_text(text: str, kind: Type) -> object:
    if kind is Type.FLAG:
        if text not in {"true", "false"}:
            raise CallError("provided string was not `true` or `false`")
        return text == "true"
    if kind is Type.SECONDS:
        if not text.isascii() or not text.isdigit():
            raise CallError("invalid digit found in string")
        return int(text)
    return from_hex(text) if kind is Type.HEX else text


def from_json(body: bytes, spec: Spec) -> Arguments:
    """Read a JSON object; no body at all is an empty one. Raises `CallError`."""
    if not body.strip():
        return Arguments({})
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()):
            raise CallError(f"EOF while parsing a value{_place(text, len(text))}") from None
        raise CallError(f"expected value{_place(text, error.pos + 1)}") from None
    if not isinstance(found, dict):
        raise CallError(f"invalid type: {_described(found)}, expected a map{_place(text, 1)}")
    values: dict[str, object] = {}
    for name, value in found.items():
        kind = spec.get(name)
        if kind is None or value is None:
            continue
        if not _fits(value, kind):
            end = _value_end(text, name)
            expected = "a string" if kind is Type.HEX else kind.value
            raise CallError(
                f"invalid type: {_described(value)}, expected {expected}{_place(text, end)}"
            )
        values[name] = from_hex(value) if kind is Type.HEX else value
    return Arguments(values)


def _fits(value: object, kind: Type) -> bool:
    if kind is Type.FLAG:
        return isinstance(value, bool)
    if kind is Type.SECONDS:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind is Type.TEXTS:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _described(value: object) -> str:
    if isinstance(value, bool):
        return f"boolean `{str(value).lower()}`"
    if isinstance(value, int):
        return f"integer `{value}`"
    if isinstance(value, float):
        return f"floating point `{value}`"
    if isinstance(value, str):
        return f"string {json.dumps(value)}"
    return "sequence" if isinstance(value, list) else "map"


def _value_end(text: str, name: str) -> int:
    """Return the offset just after the value of this member."""
    start = text.index(":", text.index(json.dumps(name))) + 1
    start += len(text[start:]) - len(text[start:].lstrip())
    return json.JSONDecoder().raw_decode(text, start)[1]


def _place(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    return f" at line {line} column {offset - (text.rfind(chr(10), 0, offset) + 1)}"


def from_hex(text: str) -> bytes:
    """Decode hex digits, `0x` before them or not. Raises `CallError` naming what is wrong."""
    digits = text.removeprefix("0x")
    if len(digits) % 2:
        raise CallError("Odd number of digits")
    for position, character in enumerate(digits):
        if character not in "0123456789abcdefABCDEF":
            raise CallError(f"Invalid character '{character}' at position {position}")
    return bytes.fromhex(digits)
