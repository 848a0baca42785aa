from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, field

import pytest

from dstack_mesh.ops.metrics import Metrics

# A strict reader of the text exposition format, written for these tests.

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|\Z)')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.+)\}})? (\S+)")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}

Labels = frozenset[tuple[str, str]]


@dataclass
class Family:
    kind: str
    help: str
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)


def parse(page: str) -> dict[str, Family]:
    assert page.endswith("\n")
    families: dict[str, Family] = {}
    helps: dict[str, str] = {}
    current = ""
    for line in page.removesuffix("\n").split("\n"):
        if line.startswith("# HELP "):
            _, _, name, help_ = line.split(" ", 3)
            assert name not in helps, "one HELP for each"
            helps[name] = help_
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert re.fullmatch(_NAME, current)
            assert current not in families, "all samples of a metric are one group"
            families[current] = Family(kind, helps[current])
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            family = families[current]
            suffix = match[1].removeprefix(current)
            assert suffix in _SUFFIXES[family.kind], line
            key = suffix, labels(match[2] or "")
            assert key not in family.samples, f"twice: {line}"
            family.samples[key] = float(match[3])
    return families


def labels(inside: str) -> Labels:
    found: dict[str, str] = {}
    at = 0
    while at < len(inside):
        match = _LABEL.match(inside, at)
        assert match, inside[at:]
        assert match[1] not in found
        found[match[1]] = re.sub(
            r'\\(["\\n])', lambda one: "\n" if one[1] == "n" else one[1], match[2]
        )
        at = match.end()
        assert at < len(inside) or match[3] == ""
    return frozenset(found.items())


def only(family: Family) -> dict[tuple[str, ...], float]:
    """Give the samples by their labels' values, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(given)): number
        for (_, given), number in family.samples.items()
    }


def record(
    metrics: Metrics,
    direction: str,
    method: bytes = b"GET",
    *,
    status: int = 200,
    code: str = "",
    bytes_up: int = 0,
    bytes_down: int = 0,
    seconds: float = 0.1,
) -> None:
    metrics.tally(direction).add(method, status, code, bytes_up, bytes_down, seconds)


def test_a_mesh_that_did_nothing() -> None:
    families = parse(Metrics("1.2.3").text())
    assert {name: family.kind for name, family in families.items()} == {
        "dstack_mesh_handshakes_total": "counter",
        "dstack_mesh_policy_decisions_total": "counter",
        "dstack_mesh_build_info": "gauge",
    }, "a family without a sample is no family"
    assert only(families["dstack_mesh_build_info"]) == {("1.2.3",): 1}
    assert all(family.help.endswith(".") for family in families.values())


def test_requests_by_direction_method_class_and_code() -> None:
    metrics = Metrics("1")
    record(metrics, "outbound")
    record(metrics, "outbound", status=204)
    record(metrics, "outbound", status=502, code="peer_untrusted")
    record(metrics, "inbound", b"POST", status=404)
    record(metrics, "inbound", b"POST", status=0)
    family = parse(metrics.text())["dstack_mesh_requests_total"]
    # labels in the order code, direction, method, status_class
    assert only(family) == {
        ("", "outbound", "GET", "2xx"): 2,
        ("peer_untrusted", "outbound", "GET", "5xx"): 1,
        ("", "inbound", "POST", "4xx"): 1,
        ("", "inbound", "POST", "none"): 1,
    }
    (names,) = {frozenset(dict(given)) for _, given in family.samples}
    assert names == {"direction", "method", "status_class", "code"}


def test_methods_of_a_clients_own_making_are_one_label() -> None:
    metrics = Metrics("1")
    for number in range(1000):
        record(metrics, "outbound", b"M%d" % number)
    record(metrics, "outbound", b"get")  # methods are case-sensitive
    record(metrics, "outbound", b'"\\\n')
    standard = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH")
    for method in standard:
        record(metrics, "outbound", method)
    family = parse(metrics.text())["dstack_mesh_requests_total"]
    counts = {dict(given)["method"]: number for (_, given), number in family.samples.items()}
    assert counts == {"other": 1002, **{method.decode(): 1 for method in standard}}


def test_bytes_each_way() -> None:
    metrics = Metrics("1")
    record(metrics, "outbound", bytes_up=3, bytes_down=2**40)
    record(metrics, "outbound", bytes_up=4, bytes_down=1)
    family = parse(metrics.text())["dstack_mesh_bytes_total"]
    assert only(family) == {("outbound", "up"): 7, ("outbound", "down"): 2**40 + 1}


def test_handshakes_and_decisions() -> None:
    metrics = Metrics("1")
    for result in ("ok", "ok", "tls_failed"):
        metrics.count_handshake("outbound", result)
    metrics.count_handshake("inbound", "ok")
    for decision in ("allow", "deny", "allow"):
        metrics.count_decision(decision)
    families = parse(metrics.text())
    handshakes = only(families["dstack_mesh_handshakes_total"])
    assert {key: count for key, count in handshakes.items() if count} == {
        ("outbound", "ok"): 2,
        ("outbound", "tls_failed"): 1,
        ("inbound", "ok"): 1,
    }
    assert handshakes["outbound", "peer_app_id_mismatch"] == 0, "so that the first is an increase"
    assert only(families["dstack_mesh_policy_decisions_total"]) == {
        ("allow",): 2,
        ("audit",): 0,
        ("deny",): 1,
    }


def buckets(family: Family, direction: str) -> dict[float, float]:
    found = {}
    for (suffix, given), number in family.samples.items():
        by_name = dict(given)
        if suffix == "_bucket" and by_name["direction"] == direction:
            found[float(by_name["le"])] = number
    return found


@pytest.mark.parametrize(("seconds", "least"), [(0.0, 0.0005), (0.1, 0.1), (0.1001, 0.25)])
def test_a_duration_is_in_each_bucket_that_reaches_to_it(seconds: float, least: float) -> None:
    metrics = Metrics("1")
    record(metrics, "outbound", seconds=seconds)
    found = buckets(parse(metrics.text())["dstack_mesh_request_duration_seconds"], "outbound")
    assert found == {bound: float(bound >= least) for bound in found}
    assert least in found


def test_histograms_are_cumulative_and_fit_their_count_and_sum() -> None:
    metrics, chance = Metrics("1"), random.Random(7)
    durations = {
        "outbound": [chance.expovariate(10) for _ in range(500)],
        "inbound": [chance.uniform(0, 200) for _ in range(300)],
    }
    for direction, values in durations.items():
        for value in values:
            record(metrics, direction, seconds=value)
    family = parse(metrics.text())["dstack_mesh_request_duration_seconds"]
    for direction, values in durations.items():
        found = buckets(family, direction)
        bounds = list(found)
        assert bounds == sorted(bounds), "in rising order"
        assert bounds[-1] == math.inf
        for bound, count in found.items():
            assert count == sum(value <= bound for value in values), bound
        key = frozenset({("direction", direction)})
        assert family.samples["_count", key] == found[math.inf] == len(values)
        assert family.samples["_sum", key] == pytest.approx(sum(values))


def test_what_is_read_is_asked_for_each_time() -> None:
    metrics = Metrics("1")
    state = {"idle": 1}
    metrics.read(
        "pool_connections",
        "gauge",
        "Connections to upstreams.",
        lambda: [({"state": key}, value) for key, value in state.items()],
    )
    metrics.read("plain", "gauge", "No label.", lambda: [({}, 1.7e9)])
    assert only(parse(metrics.text())["dstack_mesh_pool_connections"]) == {("idle",): 1}
    state["idle"], state["busy"] = 5, 2
    families = parse(metrics.text())
    assert only(families["dstack_mesh_pool_connections"]) == {("idle",): 5, ("busy",): 2}
    assert only(families["dstack_mesh_plain"]) == {(): 1.7e9}


@pytest.mark.parametrize("odd", ['a"b', "a\\b", "a\nb", '\\"', "\\n", '",x="1', "} 1\n# TYPE x"])
def test_labels_are_escaped(odd: str) -> None:
    metrics = Metrics(odd)
    metrics.read("odd", "gauge", "Odd.", lambda: [({"a": odd, "b": "c"}, 1)])
    families = parse(metrics.text())
    assert only(families["dstack_mesh_odd"]) == {(odd, "c"): 1}
    assert only(families["dstack_mesh_build_info"]) == {(odd,): 1}


@pytest.mark.parametrize("value", [0, 1, 0.1, 1_700_000_000.25, 2**49, math.inf])
def test_values_keep_their_precision(value: float) -> None:
    metrics = Metrics("1")
    metrics.read("v", "gauge", "A value.", lambda: [({}, value)])
    assert only(parse(metrics.text())["dstack_mesh_v"]) == {(): value}
