"""The guest agent's answers on the wire: JSON, protobuf, and the pages of its web framework."""

from __future__ import annotations

import json

from dstack_mesh.sim.messages import Request, Response

Value = str | bytes | bool
Fields = dict[str, "Value | list[str] | list[bytes]"]
"""A message: bytes are hex in JSON; in protobuf, fields are numbered in this order."""

_COMMON = [("server", "dstack Simulator"), ("x-frame-options", "SAMEORIGIN")]


def wants_protobuf(request: Request) -> bool:
    """Tell whether the real agent takes this for protobuf: a POST that nothing marks as JSON."""
    content_type = (request.header("content-type") or "").partition(";")[0].strip().lower()
    asked = {part.partition("=")[0] for part in request.query.split("&")}
    marked = content_type == "application/json" or "json" in asked
    return request.method == "POST" and not marked


def json_answer(status: int, fields: Fields) -> Response:
    """Encode as JSON without spaces."""
    shown = {
        name: [_in_json(item) for item in value] if isinstance(value, list) else _in_json(value)
        for name, value in fields.items()
    }
    headers = [("content-type", "application/json"), *_COMMON]
    return Response(status, headers, json.dumps(shown, separators=(",", ":")).encode())


def _in_json(value: Value) -> str | bool:
    return value.hex() if isinstance(value, bytes) else value


def protobuf_answer(status: int, fields: Fields) -> Response:
    """Encode as a protobuf message (proto3: what is empty or false is left out)."""
    encoded = b""
    for number, value in enumerate(fields.values(), start=1):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                encoded += _varint(number << 3) + b"\x01" if item else b""
                continue
            content = item.encode() if isinstance(item, str) else item
            if content:
                encoded += _varint(number << 3 | 2) + _varint(len(content)) + content
    return Response(status, [("content-type", "application/octet-stream"), *_COMMON], encoded)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def page(status: int, title: str) -> Response:
    """Answer with an HTML error page, as where there is no such route."""
    title = f"{status} {title}"
    text = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head><body>{title}</body></html>"
    headers = [("content-type", "text/html; charset=utf-8"), *_COMMON]
    return Response(status, headers, text.encode())
