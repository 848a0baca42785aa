from __future__ import annotations

import logging

import pytest

from dstack_mesh.log import event

logger = logging.getLogger("tests.log")


def test_an_event_is_its_name_and_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tests.log"):
        event(logger, logging.WARNING, "dial_failed", address="127.0.0.1:1", tries=3)
    (record,) = caplog.records
    assert record.getMessage() == "dial_failed"
    assert (record.levelno, record.name) == (logging.WARNING, "tests.log")
    assert record.fields == {"address": "127.0.0.1:1", "tries": 3}


def test_a_field_may_have_any_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tests.log"):
        event(logger, logging.INFO, "named", name="a", level="b", logger="c", message="d")
    assert caplog.records[0].fields == {"name": "a", "level": "b", "logger": "c", "message": "d"}


def test_a_percent_sign_is_no_format(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tests.log"):
        event(logger, logging.INFO, "path_seen", path="/%s%d")
    assert caplog.records[0].getMessage() == "path_seen"


def test_the_record_points_at_who_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tests.log"):
        event(logger, logging.INFO, "here")
    assert caplog.records[0].funcName == "test_the_record_points_at_who_logged"


def test_nothing_is_made_below_the_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tests.log"):
        event(logger, logging.DEBUG, "quiet", field=1)
    assert caplog.records == []
