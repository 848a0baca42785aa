from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dstack_mesh.log import event
from dstack_mesh.model import AppId, TcpAddress, UnixAddress
from dstack_mesh.ops import logs

APP = AppId("3f" * 20)


class Colour(Enum):
    RED = "red"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass
class Point:
    x: int


def _fail(detail: object) -> NoReturn:
    raise ValueError(detail)


class Lines(logging.Handler):
    """Keeps what a formatter made of each record."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("dstack_mesh.test_logs")
    found.setLevel(logging.DEBUG)
    found.propagate = False
    yield found
    found.handlers.clear()
    found.propagate = True


@pytest.fixture
def as_json(logger: logging.Logger) -> Lines:
    handler = Lines(logs.JsonFormatter())
    logger.addHandler(handler)
    return handler


@pytest.fixture
def as_text(logger: logging.Logger) -> Lines:
    handler = Lines(logs.TextFormatter())
    logger.addHandler(handler)
    return handler


def _only(handler: Lines) -> dict[str, Any]:
    (line,) = handler.lines
    assert line.isascii()
    assert line.isprintable()
    found: dict[str, Any] = json.loads(line)
    return found


def test_an_event_is_one_json_object(logger: logging.Logger, as_json: Lines) -> None:
    event(logger, logging.INFO, "listening", address=TcpAddress("::1", 80), count=3, ok=True)
    line = _only(as_json)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("ts"))
    assert line == {
        "level": "info",
        "event": "listening",
        "logger": "dstack_mesh.test_logs",
        "address": "[::1]:80",
        "count": 3,
        "ok": True,
    }


def test_the_time_is_utc_to_the_millisecond() -> None:
    record = logging.makeLogRecord({"created": 1700000000.9996, "msg": "x", "fields": {}})
    assert json.loads(logs.JsonFormatter().format(record))["ts"] == "2023-11-14T22:13:20.999Z"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (APP, APP),
        (None, None),
        (1.5, 1.5),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (UnixAddress("/run/a"), "unix:/run/a"),
        (Path("/a"), "/a"),
        (b"a\xffb\n", "a\\xffb\n"),
        (Colour.RED, "red"),
        (ValueError("no"), "ValueError: no"),
        (TimeoutError(), "TimeoutError"),
        (Broken(), "<Broken>"),
        (ExceptionGroup("g", [ValueError("x")]), "ExceptionGroup: g (1 sub-exception)"),
        ({"b", "a"}, ["a", "b"]),
        ((1, b"x"), [1, "x"]),
        ({1: {"a": TcpAddress("h", 1)}}, {"1": {"a": "h:1"}}),
        (Point(1), "Point(x=1)"),
        ("a\u2028\x00\udc80\x7f", "a\u2028\x00\udc80\x7f"),
        ([[[[[["deep"]]]]]], [[[["[['deep']]"]]]]),
    ],
)
def test_values_of_every_type(
    logger: logging.Logger, as_json: Lines, value: object, shown: object
) -> None:
    event(logger, logging.INFO, "x", value=value)
    line = as_json.lines[0]
    assert line.isascii()
    assert "\n" not in line
    assert json.loads(line)["value"] == shown


def test_a_field_cannot_pose_as_the_frame(logger: logging.Logger, as_json: Lines) -> None:
    event(logger, logging.INFO, "x", level="fatal", ts=0)
    line = _only(as_json)
    assert (line["level"], line["field_level"], line["field_ts"]) == ("info", "fatal", 0)


@pytest.mark.parametrize("key", ["-----BEGIN PRIVATE KEY-----\nM", b"BEGIN EC PRIVATE KEY"])
def test_a_key_is_never_written(
    logger: logging.Logger, as_json: Lines, as_text: Lines, key: object
) -> None:
    try:
        _fail(key)
    except ValueError as error:
        event(logger, logging.INFO, "x", a=key, b=[{"c": key}], d=error, e={key: 1})
        logger.exception("it failed with %s", key)
    assert not [line for line in as_json.lines + as_text.lines if "PRIVATE" in line]
    assert json.loads(as_json.lines[0])["a"] == "[redacted]"


def test_records_of_libraries(logger: logging.Logger, as_json: Lines) -> None:
    logger.warning("took %d ms\nforged", 5)
    line = _only(as_json)
    assert (line["event"], line["message"]) == ("log_message", "took 5 ms\nforged")


def test_a_librarys_own_mistake_loses_nothing() -> None:
    record = logging.makeLogRecord({"msg": "took %d ms", "args": ("five",)})
    assert json.loads(logs.JsonFormatter().format(record))["message"] == "took %d ms"


def test_an_exceptions_traceback_is_a_field(logger: logging.Logger, as_json: Lines) -> None:
    try:
        _fail("first\nsecond")
    except ValueError:
        logger.exception("failed")
    line = _only(as_json)
    assert line["level"] == "error"
    assert "Traceback (most recent call last)" in line["exception"]
    assert line["exception"].endswith("ValueError: first\nsecond\n")


def test_text_is_one_line_for_people(logger: logging.Logger, as_text: Lines) -> None:
    event(logger, logging.INFO, "listening", address="h:1", note='a "b"\nc\x7f\x1b', n=3, no=None)
    (line,) = as_text.lines
    ts, rest = line.split(" ", 1)
    assert ts.endswith("Z")
    assert rest == (r'INFO    listening address=h:1 note="a \"b\"\nc\u007f\u001b" n=3 no=null')


def test_text_quotes_what_could_be_taken_for_another_field(
    logger: logging.Logger, as_text: Lines
) -> None:
    event(logger, logging.INFO, "x", a="1 b=2", c="", d=["e f"], g="ä")
    assert as_text.lines[0].endswith(r' x a="1 b=2" c="" d="[\"e f\"]" g="ä"')


def test_a_traceback_in_text_is_marked_line_by_line(logger: logging.Logger, as_text: Lines) -> None:
    try:
        _fail("x\n2030-01-01T00:00:00.000Z INFO forged")
    except ValueError:
        logger.exception("failed")
    first, *rest = as_text.lines[0].splitlines()
    assert first.endswith("log_message message=failed")
    assert rest
    assert [line for line in rest if not line.startswith(" | ")] == []


def _emit(handler: logging.Handler, name: str) -> None:
    record = {"name": "x", "levelno": logging.INFO, "levelname": "INFO", "msg": name, "fields": {}}
    handler.handle(logging.makeLogRecord(record))


def test_a_line_is_written_at_once() -> None:
    read, write = os.pipe()
    handler = logs.LineHandler(write)
    handler.setFormatter(logs.JsonFormatter())
    _emit(handler, "one")
    assert json.loads(os.read(read, 1000))["event"] == "one"
    os.close(read)
    os.close(write)


def test_a_full_disk_or_a_closed_stderr_never_raises() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    handler = logs.LineHandler(full)
    handler.setFormatter(logs.JsonFormatter())
    _emit(handler, "lost")
    os.close(full)
    _emit(handler, "lost too")


def test_after_a_cut_line_the_next_begins_on_its_own() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    handler = logs.LineHandler(ours.fileno())
    handler.setFormatter(logs.JsonFormatter())
    while not handler._line_is_open:
        _emit(handler, "x" * 1_000_000)
    theirs.settimeout(5)
    got = b""
    while len(got) == 0 or not got.endswith(b"}\n"):
        got += theirs.recv(1 << 20)
        _emit(handler, "short")
    assert json.loads(got.splitlines()[-1])["event"] == "short"
    ours.close()
    theirs.close()


def test_setup_writes_to_stderr_and_may_be_called_again() -> None:
    code = """
import logging, sys, warnings
from dstack_mesh.ops import logs
from dstack_mesh.log import event
ours, theirs = logging.getLogger("dstack_mesh.a"), logging.getLogger("library")
logs.setup("json", "debug")
event(ours, logging.DEBUG, "seen")
theirs.info("unseen")
theirs.warning("seen")
logs.setup("text", "error")
event(ours, logging.WARNING, "unseen")
event(ours, logging.ERROR, "once")
theirs.warning("unseen")
sys.stderr.close()
event(ours, logging.ERROR, "after_close")
sys.stderr = None
logs.setup("json", "info")
event(ours, logging.INFO, "without_stderr")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "")
    lines = ran.stderr.splitlines()
    assert json.loads(lines[0])["event"] == "seen"
    assert json.loads(lines[1])["message"] == "seen"
    assert lines[2].endswith("ERROR   once")
    assert "unseen" not in ran.stderr
    assert [json.loads(line)["event"] for line in lines[4:]] == ["without_stderr"]
