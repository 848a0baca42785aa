"""What both ends of a connection are to an event loop, and to the TLS between."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final, cast

_LAST_BYTES: Final = 64 * 1024


class StreamProtocol:
    """An `asyncio.Protocol` but for its bases: a compiled class can have none that is not."""

    __slots__ = ()

    def as_protocol(self) -> asyncio.BaseProtocol:
        """Give itself to an event loop."""
        return cast("asyncio.BaseProtocol", self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        raise NotImplementedError

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`; the other side has finished sending, in order."""
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        raise NotImplementedError

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        raise NotImplementedError


def left_unread(transport: Any, lost: Exception | None) -> bytes:
    """Give what the peer sent before the reset that a write of ours met; to `connection_lost` only.

    The kernel keeps what came before a reset, while event loops end the connection at the failed
    write and read no more: the reason for it, a TLS alert or an early response, would never be
    seen. Nothing of a transport that does TLS, whose plaintext this is not.
    """
    if not isinstance(lost, OSError) or transport.get_extra_info("ssl_object") is not None:
        return b""
    sock = transport.get_extra_info("socket")
    try:
        return os.read(sock.fileno(), _LAST_BYTES) if sock is not None else b""
    except OSError:
        return b""
