"""Bounds on what a peer may send. They are constants of the contract, not settings."""

from __future__ import annotations

MAX_HEAD_BYTES = 64 * 1024
"""A head's size, from the first byte of its first line to the end of its blank line."""

MAX_FIELDS = 128
"""Field lines in a head, and as many again in trailers."""

MAX_REQUEST_TARGET_BYTES = 16 * 1024

MAX_REQUEST_LINE_BYTES = MAX_REQUEST_TARGET_BYTES + 1024
"""The first line without its CRLF; what is beyond the target is room for a method."""

MAX_INTERIM_RESPONSES = 16
"""1xx answers before a final one."""

MAX_CHUNK_SIZE_DIGITS = 16
"""Hexadecimal digits of a chunk's size: sizes below 2**64."""

MAX_CHUNK_LINE_BYTES = 1024
"""A chunk's size line with its extensions, without the CRLF."""
