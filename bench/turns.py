"""What a contestant's turn is: load from outside, and its own CPU time before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from bench import wrk
from bench.contestants import Contestant
from bench.credentials import Files
from bench.mtls import Clients, clients
from bench.process import Process
from bench.race import Readings, Subject


class Meter:
    """CPU time of a process over a block, in seconds."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.seconds = 0.0

    def __enter__(self) -> Meter:
        self._before = self._process.cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._process.cpu_seconds() - self._before


def per_request(process: Process, spent: float, load: wrk.Load) -> Readings:
    """Give what a run says of a contestant."""
    return {
        "cpu_us": spent / load.requests * 1e6,
        "rate": load.rate,
        "memory_mb": process.memory_kb() / 1024,
    }


def by_wrk(
    contestant: Contestant,
    path: str,
    connections: int,
    seconds: float,
    script: str | None = None,
    arguments: Sequence[str] = (),
) -> Subject:
    """Plain HTTP, as much as goes through; a `script` is given the contestant's headers itself."""
    headers = contestant.headers

    def turn() -> Readings:
        with Meter(contestant.process) as meter:
            load = wrk.run(
                f"http://{contestant.address}{path}",
                connections=connections,
                seconds=seconds,
                headers=() if script else headers,
                script=script,
                arguments=[*arguments, *headers] if script else (),
            )
        return per_request(contestant.process, meter.seconds, load)

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
        load = wrk.Load(done["requests"], done["seconds"])
        return per_request(contestant.process, meter.seconds, load)

    return turn
