"""What a contestant's turn is: load from outside, and its own CPU time before and after."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from bench import wrk
from bench.contestants import Contestant
from bench.counter import Counter
from bench.credentials import Files
from bench.mtls import Clients, clients
from bench.origin import Origin
from bench.process import Process
from bench.race import Readings, Subject


class Meter:
    """CPU time of a process, and the time itself, over a block; in seconds."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.cpu = 0.0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.seconds = -time.perf_counter()
        self.cpu = -self._process.cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += self._process.cpu_seconds()
        self.seconds += time.perf_counter()


def per_request(process: Process, cpu: float, requests: int, seconds: float) -> Readings:
    """Give what so many requests in so many seconds say of a contestant."""
    return {
        "cpu_us": cpu / requests * 1e6,
        "rate": requests / seconds,
        "memory_mb": process.memory_kb() / 1024,
    }


def by_wrk(
    contestant: Contestant,
    made: Origin,
    path: str,
    connections: int,
    seconds: float,
    script: str | None = None,
    arguments: Sequence[str] = (),
) -> Subject:
    """Plain HTTP, as much as goes through; a `script` is given the contestant's headers itself.

    The time begins when every connection has been used, which opened those behind the subject.
    """
    headers = contestant.headers
    url = f"http://{contestant.address}{path}"
    plain = () if script else headers
    given = [*arguments, *headers] if script else ()

    def turn() -> Readings:
        with (
            contextlib.closing(Counter(made.status)) as counter,
            wrk.running(
                url, connections=connections, headers=plain, script=script, arguments=given
            ),
        ):
            counter.wait_for(2 * connections)
            with Meter(contestant.process) as meter:
                begin = counter.requests()
                time.sleep(seconds)
                count = counter.requests() - begin
            return per_request(contestant.process, meter.cpu, count, meter.seconds)

    return Subject(contestant.name, turn)


@contextlib.contextmanager
def by_mtls(
    contestants: Sequence[Contestant], files: Files, connections: int
) -> Iterator[list[tuple[Contestant, Clients]]]:
    """Connect to all contestants over mutual TLS until the block ends."""
    with contextlib.ExitStack() as stack:
        yield [
            (one, stack.enter_context(clients(one.address, connections, files)))
            for one in contestants
        ]


def asking(
    contestant: Contestant, over: Clients, seconds: float, **what: object
) -> Callable[[], Readings]:
    """As much as goes through over connections that are there; see `mtls_client.Client.ask`."""

    def turn() -> Readings:
        with Meter(contestant.process) as meter:
            done = over.do("ask", seconds=seconds, **what)
        return per_request(contestant.process, meter.cpu, done["requests"], done["seconds"])

    return turn
