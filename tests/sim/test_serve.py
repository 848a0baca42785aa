from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

COMMAND = [sys.executable, "-m", "dstack_mesh.sim.serve"]


@pytest.fixture
def base() -> Iterator[str]:
    process = subprocess.Popen([*COMMAND, "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("backend at 127.0.0.1:")
        yield f"http://{line.split()[-1]}"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_it_serves_what_the_examples_call(base: str) -> None:
    for path in ("/", "/api/data"):
        with urllib.request.urlopen(f"{base}{path}", timeout=10) as answer:
            body = answer.read()
    assert json.loads(body)["target"] == "/api/data"


@pytest.mark.parametrize("args", [[], ["a", "b"], ["127.0.0.1:x"]])
def test_wrong_usage(args: list[str]) -> None:
    ran = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2
    assert ran.stderr.startswith("usage: ")


def test_an_address_that_is_none() -> None:
    ran = subprocess.run([*COMMAND, "203.0.113.1:1"], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stderr.startswith("cannot listen on 203.0.113.1:1")) == (1, True)
