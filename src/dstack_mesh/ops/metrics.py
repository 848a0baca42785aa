"""What a worker counts, given out as families when somebody asks.

Names and labels are the contract's (interface.md, Metrics). An app-id is no label unless
`admin.label_apps` lists it, so cardinality is bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from dstack_mesh import errors
from dstack_mesh.ops.families import Family, Kind, Merge, Sample, exposition
from dstack_mesh.relay.tally import BUCKETS, Tally

Samples = Iterable[tuple[dict[str, str], float]]
"""Labels and value of each."""


_HANDSHAKES = (
    *(
        ("outbound", result)
        for result in (
            "ok",
            errors.ConnectTimeout.code,
            errors.PeerAppIdMismatch.code,
            errors.PeerRejectedUs.code,
            errors.PeerUntrusted.code,
            errors.TlsFailed.code,
        )
    ),
    ("inbound", "ok"),
    ("inbound", "failed"),
)
_DECISIONS = ("allow", "audit", "deny")


class Metrics:
    """What a worker counts, and the gauges that are read when it is asked."""

    def __init__(self, version: str) -> None:
        self._version = version
        self._tallies: dict[str, Tally] = {}
        # From 0 on: a rule about an increase does not see the first of what begins with 1.
        self._handshakes: Counter[tuple[str, str]] = Counter(dict.fromkeys(_HANDSHAKES, 0))
        self.decisions: Counter[str] = Counter(dict.fromkeys(_DECISIONS, 0))
        """Policy's, by what they were."""
        self._read: list[tuple[str, Kind, str, Callable[[], Samples], Merge]] = []

    def read(
        self,
        name: str,
        kind: Kind,
        help_: str,
        samples: Callable[[], Samples],
        merge: Merge = "sum",
    ) -> None:
        """Have `samples` asked for a gauge or counter each time; `merge`: see `Family`."""
        self._read.append((name, kind, help_, samples, merge))

    def count_handshake(self, direction: str, result: str) -> None:
        """Count a TLS handshake."""
        self._handshakes[direction, result] += 1

    def count_decision(self, decision: str) -> None:
        """Count a decision of policy."""
        self.decisions[decision] += 1

    def tally(self, direction: str) -> Tally:
        """Give the counter of a direction's exchanges."""
        found = self._tallies.get(direction)
        if found is None:
            found = self._tallies[direction] = Tally(direction)
        return found

    def tallies(self) -> list[Tally]:
        """Give all of them, in the order of their directions' names."""
        return [tally for _, tally in sorted(self._tallies.items())]

    def text(self) -> str:
        """Give the Prometheus text of this worker alone."""
        return exposition(self.dump())

    def dump(self) -> list[Family]:
        """Give everything as plain data."""
        tallies = self.tallies()
        handshakes = [
            Sample("", {"direction": direction, "result": result}, count)
            for (direction, result), count in sorted(self._handshakes.items())
        ]
        decisions = [Sample("", {"decision": key}, n) for key, n in sorted(self.decisions.items())]
        return [
            Family("requests_total", "counter", "Exchanges that have ended.", _requests(tallies)),
            Family(
                "request_duration_seconds",
                "histogram",
                "From a request's head to the end of its exchange.",
                [sample for tally in tallies for sample in _durations(tally)],
            ),
            Family(
                "bytes_total", "counter", "Bytes of bodies and responses carried.", _bytes(tallies)
            ),
            Family("handshakes_total", "counter", "TLS handshakes.", handshakes),
            Family("policy_decisions_total", "counter", "Policy decisions.", decisions),
            *(
                Family(name, kind, help_, [Sample("", *one) for one in samples()], merge)
                for name, kind, help_, samples, merge in self._read
            ),
            Family(
                "build_info",
                "gauge",
                "The running version.",
                [Sample("", {"version": self._version}, 1)],
                "last",
            ),
        ]


def _requests(tallies: list[Tally]) -> list[Sample]:
    return [
        Sample(
            "",
            {
                "direction": tally.direction,
                "method": method.decode("ascii"),
                "status_class": f"{status_class}xx" if status_class else "none",
                "code": code,
            },
            count,
        )
        for tally in tallies
        for (method, status_class, code), count in sorted(tally.requests.items())
    ]


def _bytes(tallies: list[Tally]) -> list[Sample]:
    return [
        Sample("", {"direction": tally.direction, "way": way}, count)
        for tally in tallies
        for way, count in (("down", tally.bytes_down), ("up", tally.bytes_up))
    ]


def _durations(tally: Tally) -> list[Sample]:
    labels = {"direction": tally.direction}
    samples, total = [], 0
    for bound, count in zip((*BUCKETS, None), tally.buckets, strict=True):
        total += count
        le = "+Inf" if bound is None else f"{bound:g}"
        samples.append(Sample("_bucket", {**labels, "le": le}, total))
    return [*samples, Sample("_sum", labels, tally.seconds), Sample("_count", labels, total)]
