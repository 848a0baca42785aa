"""A WebSocket echo (RFC 6455): enough of the server side to say back what it is told."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_mesh.sim.messages import Duplex

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_FIN = 0x80
_MASKED = 0x80
_CLOSE, _PING, _PONG = 0x8, 0x9, 0xA
_PROTOCOL_ERROR = 1002
_MAX_PAYLOAD = 16 * 1024 * 1024


class WebSocketError(ValueError):
    """The client broke the protocol."""


def accept_key(key: str) -> str:
    """`Sec-WebSocket-Accept` for the client's `Sec-WebSocket-Key` (RFC 6455 4.2.2)."""
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: its first byte (FIN, opcode) and its payload, unmasked."""

    first: int
    payload: bytes

    @property
    def opcode(self) -> int:
        """The opcode alone."""
        return self.first & 0x0F

    def encode(self) -> bytes:
        """Encode without a mask, as a server sends."""
        size = len(self.payload)
        if size < 126:
            length = bytes((size,))
        elif size < 1 << 16:
            length = b"\x7e" + size.to_bytes(2, "big")
        else:
            length = b"\x7f" + size.to_bytes(8, "big")
        return bytes((self.first,)) + length + self.payload


@dataclass(slots=True)
class Decoder:
    """Takes bytes as they come and gives the frames that are complete."""

    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that end in `data`. Raises `WebSocketError`."""
        self._buffer += data
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        if not buffer[1] & _MASKED:
            raise WebSocketError("a client's frame has to be masked (RFC 6455 5.1)")
        size, at = buffer[1] & 0x7F, 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, at = int.from_bytes(buffer[2 : 2 + width], "big"), 2 + width
            if len(buffer) < at:
                return None
        if size > _MAX_PAYLOAD:
            raise WebSocketError(f"a frame of {size} bytes is over {_MAX_PAYLOAD}")
        end = at + 4 + size
        if len(buffer) < end:
            return None
        frame = Frame(buffer[0], _unmask(bytes(buffer[at + 4 : end]), bytes(buffer[at : at + 4])))
        del buffer[:end]
        return frame


def _unmask(payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    stream = (mask * (size // 4 + 1))[:size]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")
    return number.to_bytes(size, "big")


async def echo(connection: Duplex) -> None:
    """Send every message back, answer pings, and close when the client does or errs."""
    decoder = Decoder()
    while data := await connection.read():
        try:
            frames = decoder.feed(data)
        except WebSocketError as error:
            reason = _PROTOCOL_ERROR.to_bytes(2, "big") + str(error).encode()
            await connection.write(Frame(_FIN | _CLOSE, reason).encode())
            return
        for frame in frames:
            if frame.opcode == _PING:
                await connection.write(Frame(_FIN | _PONG, frame.payload).encode())
            elif frame.opcode != _PONG:
                await connection.write(frame.encode())
            if frame.opcode == _CLOSE:
                return
