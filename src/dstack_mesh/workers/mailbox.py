"""How worker processes ask one another for their reports: a mailbox each, known to all.

A mailbox is a pair of sockets from before the forks. Its worker reads the one end, all others write
to the other, whole messages at a time. Who is asked answers into the mailbox of who has asked. A
worker that takes another's place takes its mailbox over, with what nobody has read: questions are
numbered by the time at which they were asked, so that old ones are known for what they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from dstack_mesh.log import event
from dstack_mesh.ops.report import Check, Readiness, WorkerReport
from dstack_mesh.workers.ledger import Ledger

log = logging.getLogger(__name__)

PATIENCE = 1.5
"""Seconds to wait for the others' reports."""

_PIECE_BYTES = 32 * 1024
_PER_TURN = 64
"""Messages read before others have their turn."""

_RETRY = 0.005
_MAX_MESSAGE_BYTES = _PIECE_BYTES + 1024

Report = Callable[[bool], Awaitable[WorkerReport]]


class Ask(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A question; the answer goes to the mailbox `asker`, with this number: its time (ns)."""

    asker: int
    number: int
    include_backend: bool


class Piece(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A part of an answer: a `WorkerReport`, packed and cut."""

    worker: int
    number: int
    part: int
    parts: int
    data: bytes


_decode = msgspec.msgpack.Decoder(Ask | Piece).decode
_encode = msgspec.msgpack.encode
_decode_report = msgspec.msgpack.Decoder(WorkerReport).decode


def socket_pairs(count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Make the mailboxes, before there are workers: (reading, writing) each."""
    pairs = []
    for _ in range(count):
        reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading.setblocking(False)
        writing.setblocking(False)
        pairs.append((reading, writing))
    return pairs


class Mailbox:
    """The mailbox of the worker `index` of as many as there are `pairs`."""

    def __init__(
        self, index: int, pairs: Sequence[tuple[socket.socket, socket.socket]], ledger: Ledger
    ) -> None:
        self._index = index
        self._ledger = ledger
        self._reading = pairs[index][0]
        self._writing = [writing for _, writing in pairs]
        self._number = 0
        self._answers: dict[int, dict[int, dict[int, bytes]]] = {}
        """By question, worker and part: what has come of the answers that are waited for."""
        self._complete: dict[int, dict[int, WorkerReport]] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, loop: asyncio.AbstractEventLoop, report: Report) -> None:
        """Answer questions from now on by `report`."""
        self._report = report
        loop.add_reader(self._reading, self._readable)

    async def collect(self, own: WorkerReport, include_backend: bool) -> list[WorkerReport]:
        """Give the reports of all workers, in their order.

        One that is silent or not there has what was counted in its place, and what is amiss.
        """
        number = self._number = max(self._number + 1, time.monotonic_ns())
        others = [
            index
            for index in range(len(self._writing))
            if index != self._index and self._ledger.is_seated(index)
        ]
        self._answers[number], self._complete[number] = {}, {}
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    ask = _encode(Ask(self._index, number, include_backend))
                    # At once: the mailbox of one that does not read may be full.
                    await asyncio.gather(*(self._send(index, ask) for index in others))
                    while len(self._complete[number]) < len(others):
                        self._changed.clear()
                        await self._changed.wait()
            found = {**self._complete[number], self._index: own}
        finally:
            del self._answers[number], self._complete[number]
        return [
            found[index] if index in found else self._silent(own, index)
            for index in range(len(self._writing))
        ]

    def _readable(self) -> None:
        for _ in range(_PER_TURN):
            try:
                received = self._reading.recv(_MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            try:
                self._understand(received)
            except (msgspec.MsgspecError, LookupError) as error:
                # Nobody else can write here, so it is our own mistake. Serving goes on.
                event(log, logging.ERROR, "worker_message_unusable", reason=str(error))

    def _understand(self, received: bytes) -> None:
        message = _decode(received)
        if isinstance(message, Piece):
            self._take(message)
        elif time.monotonic_ns() - message.number < PATIENCE * 1e9:
            task = asyncio.get_running_loop().create_task(self._answer(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _take(self, piece: Piece) -> None:
        answers = self._answers.get(piece.number)
        if answers is None:
            return  # nobody waits for it any more
        parts = answers.setdefault(piece.worker, {})
        parts[piece.part] = piece.data
        if len(parts) == piece.parts:
            whole = b"".join(parts[number] for number in range(piece.parts))
            self._complete[piece.number][piece.worker] = _decode_report(whole)
            self._changed.set()

    async def _answer(self, ask: Ask) -> None:
        packed = _encode(await self._report(ask.include_backend))
        pieces = [packed[at : at + _PIECE_BYTES] for at in range(0, len(packed), _PIECE_BYTES)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                for number, data in enumerate(pieces):
                    piece = Piece(self._index, ask.number, number, len(pieces), data)
                    await self._send(ask.asker, _encode(piece))

    async def _send(self, index: int, message: bytes) -> None:
        while True:
            try:
                self._writing[index].send(message)
            except BlockingIOError:
                await asyncio.sleep(_RETRY)
            else:
                return

    def _silent(self, own: WorkerReport, index: int) -> WorkerReport:
        """Give what there is to say of a worker that says nothing."""
        how = "does not answer" if self._ledger.is_seated(index) else "is not running"
        check = Check(ok=False, reason=f"worker {index} {how}")
        status = msgspec.structs.replace(
            own.status,
            workers=0,
            tasks=0,
            readiness=Readiness(ready=False, checks={"workers": check}),
            traffic={},
            decisions={},
            targets=[],
            callers=[],
            incidents=[],
        )
        return WorkerReport(pid=0, metrics=self._ledger.counted(index), status=status)
