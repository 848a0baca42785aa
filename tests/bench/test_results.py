from __future__ import annotations

import json
from pathlib import Path

from bench.plan import Found, Plan
from bench.race import Row
from bench.results import collect, merged, read, rows, write

BUILD = {"dstack-mesh": "0.1.0", "code": "pure"}
ROW = Row("small", "cpu_us", {"mesh": [22.123456, 1.0], "nginx": [20.0, 2.0]})


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    found = {"small-get": Found("Small", [ROW], ["A note."], {"held": "1"})}

    write(tmp_path / "new" / "file.json", collect(found, BUILD, Plan(rounds=2)))
    whole = read(tmp_path / "new" / "file.json")

    assert whole is not None
    part = whole["parts"]["small-get"]
    assert rows(part) == [Row("small", "cpu_us", {"mesh": [22.12, 1.0], "nginx": [20.0, 2.0]})]
    assert (part["title"], part["notes"], part["plain"]) == ("Small", ["A note."], {"held": "1"})
    assert (part["build"], part["rounds"]) == (BUILD, 2)
    assert whole["machine"]["CPU"]


def test_the_values_of_a_subject_are_on_one_line(tmp_path: Path) -> None:
    write(tmp_path / "file.json", collect({"a": Found("A", [ROW])}, BUILD, Plan()))

    text = (tmp_path / "file.json").read_text()
    assert '"mesh": [22.12, 1.0]' in text
    json.loads(text)


def test_nothing_written_is_nothing_to_read(tmp_path: Path) -> None:
    assert read(tmp_path / "none.json") is None


def test_new_parts_replace_old_ones_of_the_same_machine_only() -> None:
    old = {"machine": {"CPU": "a"}, "parts": {"one": 1, "two": 2}}
    new = {"machine": {"CPU": "a"}, "parts": {"two": 3}}
    elsewhere = {"machine": {"CPU": "b"}, "parts": {"two": 3}}

    assert merged(old, new)["parts"] == {"one": 1, "two": 3}
    assert merged(old, elsewhere) == elsewhere
    assert merged(None, new) == new
