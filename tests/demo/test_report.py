from __future__ import annotations

import json
from typing import Any

import pytest

from dstack_mesh.demo.act import Act
from dstack_mesh.demo.report import JsonDisplay
from tests.demo.fakes import FakeStage, never, result


def written(*, keep: bool, ok: bool = True) -> dict[str, Any]:
    lines: list[str] = []
    display = JsonDisplay(lines.append, keep=keep)
    stage, act = FakeStage(), Act("call", "it is tried", "it works", never)
    display.begin(stage)
    display.playing(act)
    display.played(result(act, ok=ok))
    assert lines == []
    display.end(1.23456)
    display.keep(stage)
    (line,) = lines
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize("ok", [True, False])
def test_one_line_says_all(ok: bool) -> None:
    found = written(keep=False, ok=ok)
    assert found == {
        "ok": ok,
        "seconds": 1.235,
        "acts": [
            {
                "name": "call",
                "tried": "it is tried",
                "expected": "it works",
                "happened": "200 in 4 ms\nas it should",
                "ok": ok,
                "seconds": 0.25,
            }
        ],
        "apps": {
            "shop": {
                "app_id": "a" * 40,
                "outbound": "127.0.0.1:1001",
                "inbound": "127.1.2.3:3000",
                "admin": "127.0.0.1:1002",
                "pid": 101,
            },
            "billing": {
                "app_id": "b" * 40,
                "outbound": "127.0.0.1:2001",
                "inbound": "127.1.2.3:3000",
                "admin": "127.0.0.1:2002",
                "pid": 102,
            },
        },
    }


def test_what_to_try_is_there_when_it_is_kept() -> None:
    lines = written(keep=True)["try"]
    assert lines[0] == "APP_ID=$(curl -s http://127.0.0.1:2001/info | jq -r .app_id)"
