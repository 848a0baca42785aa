"""What worker processes leave for each other and for their supervisor, in memory that all see.

It outlives a worker: its successor goes on counting where it had stopped (a sum that falls is taken
for a restart by who reads metrics), and knows the KMS root that it knew.
"""

from __future__ import annotations

import mmap
import zlib
from typing import Final

import msgspec

from dstack_mesh.identity.known_root import KnownRoot
from dstack_mesh.ops.families import Family, merge_families
from dstack_mesh.ops.report import WorkerReport

_HEAD: Final = 8
_CHECKSUM: Final = 4
_ROOT_BYTES: Final = 64
_STATUS_BYTES: Final = 1024
_COUNTS_BYTES: Final = 1024 * 1024
"""Room for some 5,000 samples, many times what a busy mesh has. None is used until written to."""

_TRIES: Final = 100

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(list[Family]).decode


class Slot:
    """A place for the last of what one process writes, whole or not at all to who reads.

    What is written goes behind what is read, and one store of eight bytes makes it the valid one:
    a writer that dies at any point leaves what was there before.
    """

    def __init__(self, memory: memoryview, size: int) -> None:
        """`memory` has `room(size)` bytes, all zero."""
        self._head = memory[:_HEAD].cast("Q")
        self._half = size + _CHECKSUM
        self._body = memory[_HEAD : Slot.room(size)]

    @staticmethod
    def room(size: int) -> int:
        """Give the bytes of memory that a slot for `size` bytes takes: a multiple of eight."""
        return _HEAD + -(-2 * (size + _CHECKSUM) // 8) * 8

    def write(self, data: bytes) -> bool:
        """Replace what is there; False where there is no room for it, and the old one stays."""
        if len(data) > self._half - _CHECKSUM:
            return False
        half = 1 - (self._head[0] >> 32)
        start = half * self._half
        checked = zlib.crc32(data).to_bytes(_CHECKSUM) + data
        self._body[start : start + len(checked)] = checked
        self._head[0] = half << 32 | len(checked)
        return True

    def read(self) -> bytes:
        """Give what was written last; empty: nothing yet."""
        for _ in range(_TRIES):  # it may be written twice while we read
            half, size = divmod(self._head[0], 1 << 32)
            if not size:
                break
            start = half * self._half
            found = bytes(self._body[start : start + size])
            if zlib.crc32(found[_CHECKSUM:]) == int.from_bytes(found[:_CHECKSUM]):
                return found[_CHECKSUM:]
        return b""


class Ledger:
    """All that is shared, made before there are workers."""

    def __init__(self, workers: int) -> None:
        rooms = [_ROOT_BYTES, *[_STATUS_BYTES, _COUNTS_BYTES] * workers]
        memory = memoryview(mmap.mmap(-1, sum(map(Slot.room, rooms)) + workers))
        slots = []
        for size in rooms:
            slots.append(Slot(memory, size))
            memory = memory[Slot.room(size) :]
        self.root = SharedRoot(slots[0])
        self._statuses = slots[1::2]
        self._counts = slots[2::2]
        self._seated = memory[:workers]

    def seat(self, index: int, *, is_taken: bool) -> None:
        """Say that there is somebody in a worker's place, or nobody; for the supervisor."""
        self._seated[index] = is_taken
        self._statuses[index].write(b"")

    def is_seated(self, index: int) -> bool:
        """Tell whether there is a worker in this place, which may be asked."""
        return bool(self._seated[index])

    def describe(self, index: int, status: str) -> None:
        """Leave a line on how a worker is, for `status`."""
        self._statuses[index].write(status.encode("utf-8", "backslashreplace")[:_STATUS_BYTES])

    def status(self) -> str:
        """Say in one line how all workers are, for people."""
        found = [
            (slot.read().decode("utf-8", "replace") or "starting") if seated else "being replaced"
            for slot, seated in zip(self._statuses, self._seated, strict=True)
        ]
        if len(set(found)) == 1:
            return f"{found[0]} ({len(found)} workers)"
        return "; ".join(f"worker {index}: {line}" for index, line in enumerate(found))

    def counted(self, index: int) -> list[Family]:
        """Give what has been counted in a worker's place, as far as it was ever told."""
        found = self._counts[index].read()
        return _decode(found) if found else []

    def books(self, index: int) -> Books:
        """Give a new worker its books, which begin with what was counted before it."""
        return Books(self._counts[index], self.counted(index))


class Books:
    """What is counted in one worker's place, those who were in it before included."""

    def __init__(self, slot: Slot, before: list[Family]) -> None:
        self._slot = slot
        self._before = before

    def enter(self, report: WorkerReport) -> WorkerReport:
        """Give `report` with what was counted before, which is noted before anybody is told it."""
        counts = [family for family in report.metrics if _adds_up(family)]
        whole = merge_families([counts, self._before])
        self._slot.write(_encode(whole))
        by_name = {family.name: family for family in whole}
        metrics = [by_name.pop(family.name, family) for family in report.metrics]
        return msgspec.structs.replace(report, metrics=[*metrics, *by_name.values()])


class SharedRoot(KnownRoot):
    """The KMS root key that all workers know, once one of them has seen it."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self._slot = slot

    def digest(self) -> bytes:
        """See `KnownRoot`."""
        return self._slot.read()

    def learn(self, digest: bytes) -> None:
        """See `KnownRoot`."""
        if not self._slot.read():
            self._slot.write(digest)


def _adds_up(family: Family) -> bool:
    return family.kind != "gauge" and family.merge == "sum"
