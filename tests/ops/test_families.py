from __future__ import annotations

import msgspec
import pytest

from dstack_mesh.ops.families import Family, Merge, Sample, exposition, merge_families


def gauge(merge: Merge, *values: float) -> list[list[Family]]:
    return [[Family("g", "gauge", "A gauge.", [Sample("", {}, v)], merge)] for v in values]


@pytest.mark.parametrize(
    ("merge", "merged"), [("sum", 6.0), ("max", 3.0), ("min", 1.0), ("last", 1.0)]
)
def test_each_family_says_how_it_adds_up(merge: Merge, merged: float) -> None:
    ((family,),) = [merge_families(gauge(merge, 2, 3, 1))]
    assert family.samples == [Sample("", {}, merged)]
    assert (family.name, family.merge) == ("g", merge)


def test_samples_are_merged_by_suffix_and_labels_and_none_is_lost() -> None:
    def worker(*samples: Sample) -> list[Family]:
        return [Family("h", "histogram", "A histogram.", list(samples))]

    one = worker(Sample("_sum", {"a": "1", "b": "2"}, 1.5), Sample("_count", {"a": "1"}, 1))
    other = worker(Sample("_count", {"a": "1"}, 2), Sample("_sum", {"b": "2", "a": "1"}, 2.0))
    third = worker(Sample("_count", {"a": "other"}, 7))
    (family,) = merge_families([one, other, third])
    assert family.samples == [
        Sample("_sum", {"a": "1", "b": "2"}, 3.5),
        Sample("_count", {"a": "1"}, 3),
        Sample("_count", {"a": "other"}, 7),
    ]


def test_a_family_that_only_one_worker_has_stays() -> None:
    alone = Family("alone", "counter", "Alone.", [Sample("", {}, 1)])
    merged = merge_families([gauge("sum", 1)[0], [*gauge("sum", 2)[0], alone]])
    assert [family.name for family in merged] == ["g", "alone"]


def test_a_dump_crosses_a_socket() -> None:
    dump = [Family("h", "histogram", "H.", [Sample("_bucket", {"le": "+Inf"}, 2)], "max")]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(dump), type=list[Family]) == dump


def test_the_text_is_prometheus_own() -> None:
    families = [
        Family("a_total", "counter", "A.", [Sample("", {"x": "1", "y": '"\\\n'}, 2)]),
        Family("none", "gauge", "Without a sample.", []),
        Family("b", "gauge", "B.", [Sample("", {}, 0.25)]),
    ]
    assert exposition(families) == (
        "# HELP dstack_mesh_a_total A.\n"
        "# TYPE dstack_mesh_a_total counter\n"
        'dstack_mesh_a_total{x="1",y="\\"\\\\\\n"} 2\n'
        "# HELP dstack_mesh_b B.\n"
        "# TYPE dstack_mesh_b gauge\n"
        "dstack_mesh_b 0.25\n"
    )
