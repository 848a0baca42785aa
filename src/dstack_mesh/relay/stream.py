"""What both ends of a connection are to an event loop, and to the TLS between."""

from __future__ import annotations

import asyncio
from typing import cast


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
