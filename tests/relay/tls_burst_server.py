"""A process of its own, whose memory is measured: it takes a burst per connection and gives one.

It prints its port, and for each line that it is sent what it holds, in bytes.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import socket
import sys
import threading
from pathlib import Path

import uvloop
from tests.identity.conftest import Kms
from tests.relay.tls_scene import TLS13, Recorder

from dstack_mesh.identity import tls as contexts
from dstack_mesh.relay.deadlines import Timeouts
from dstack_mesh.relay.tls import TlsTransport
from dstack_mesh.relay.worker import Worker

BURST = 1 << 20
_ANSWER = bytes(BURST)


class _Burst(Recorder):
    """Answers a burst with one, and is ready for the next."""

    def data_received(self, data: bytes) -> None:
        self.pieces.append(len(data))
        if sum(self.pieces) == BURST:
            self.pieces.clear()
            self.transport.write(_ANSWER)


def resident() -> int:
    """What this process holds, once what is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().split("VmRSS:")[1]
    return int(status.split()[0]) * 1024


async def _serve(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    worker = Worker(loop, Timeouts())
    context = contexts.server_context(Kms().leaf().credentials, TLS13)
    kept = []
    while True:
        sock, _ = await loop.sock_accept(listener)
        ours = TlsTransport(
            worker,
            _Burst(),
            lambda incoming, outgoing: context.wrap_bio(incoming, outgoing, True),
            lambda error: None,
            server_side=True,
        )
        kept.append(ours)
        await loop.connect_accepted_socket(ours.as_protocol, sock)
        kept = [one for one in kept if one.ssl_object is None or not one.is_closing()]


def _answer() -> None:
    for _ in sys.stdin:
        print(resident(), flush=True)  # noqa: T201 - to the test


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=300)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)  # noqa: T201 - to the test
    threading.Thread(target=_answer, daemon=True).start()
    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(_serve(listener))


if __name__ == "__main__":
    main()
