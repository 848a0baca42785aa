from __future__ import annotations

import pytest
from bench.race import Readings, Row, Spread, Subject, absurd, race, spread


class Scripted:
    """A subject that writes down its turns and gives the next value of a list."""

    def __init__(self, name: str, log: list[str], values: list[float]) -> None:
        self.name = name
        self._log = log
        self._values = iter(values)

    def turn(self) -> Readings:
        self._log.append(self.name)
        return {"cpu_us": next(self._values)}

    @property
    def subject(self) -> Subject:
        return Subject(self.name, self.turn)


def test_subjects_take_turns_and_their_warm_up_does_not_count() -> None:
    log: list[str] = []
    mesh = Scripted("mesh", log, [99.0, 10.0, 12.0])
    nginx = Scripted("nginx", log, [98.0, 20.0, 10.0])

    rows = race("small", [mesh.subject, nginx.subject], rounds=2)

    assert log == ["mesh", "nginx"] * 3
    assert rows == [Row("small", "cpu_us", {"mesh": [10.0, 12.0], "nginx": [20.0, 10.0]})]


def test_a_ratio_is_of_one_round() -> None:
    row = Row("small", "cpu_us", {"mesh": [10.0, 30.0, 11.0], "nginx": [10.0, 60.0, 10.0]})

    assert row.ratios("nginx") == [1.0, 0.5, pytest.approx(1.1)]
    assert spread(row.ratios("nginx")) == Spread(1.0, 0.5, pytest.approx(1.1))
    assert row.median("mesh") == 11.0
    assert row.peers() == ["nginx"]


def test_there_is_no_ratio_to_nothing() -> None:
    assert Row("small", "growth_mb", {"mesh": [1.0], "nginx": [0.0]}).ratios("nginx") == []


@pytest.mark.parametrize(
    ("mesh", "nginx", "said"),
    [
        ([1.0], [21.0], "0.05 times that of nginx"),
        ([21.0], [1.0], "21.00 times that of nginx"),
        ([-1.0], [1.0], "mesh is -1.0"),
        ([float("nan")], [1.0], "mesh is nan"),
        ([1.0], [float("inf")], "nginx is inf"),
    ],
)
def test_what_cannot_be_is_said(mesh: list[float], nginx: list[float], said: str) -> None:
    found = absurd(Row("small", "cpu_us", {"mesh": mesh, "nginx": nginx}))

    assert found is not None
    assert said in found


def test_a_slow_machine_is_not_absurd() -> None:
    assert absurd(Row("small", "cpu_us", {"mesh": [900.0], "nginx": [60.0]})) is None
    assert absurd(Row("small", "p99_ms", {"mesh": [500.0], "nginx": [1.0]})) is None
    assert absurd(Row("small", "cpu_us", {"one worker": [1.0], "two workers": [50.0]})) is None
