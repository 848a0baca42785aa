from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dstack_mesh.settings.load import load_settings
from dstack_mesh.workers.reread import Reread

pytestmark = pytest.mark.usefixtures("logging_as_before")


def reread(path: Path, text: str = "") -> Reread:
    path.write_text(text)
    return Reread(load_settings({}, {}, path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mesh.toml"


def test_what_was_read_again_counts_when_it_is_adopted(file: Path) -> None:
    one = reread(file)
    file.write_text("[inbound]\nallow = 'self'\npolicy_mode = 'audit'\n")
    one.look()
    assert one.settings() == one.started.settings
    one.adopt()
    assert one.settings().inbound.policy_mode == "audit"
    assert one.settings().inbound.allow == one.current.settings.inbound.allow


def test_what_cannot_change_while_running_stays(file: Path) -> None:
    """A successor would else be unlike its siblings."""
    one = reread(file)
    file.write_text(
        "drain_timeout = '1s'\n[inbound]\nbackend = 'other:1'\nallow = 'self'\n"
        "[log]\nlevel = 'debug'\naccess = 'all'\n"
        "[[inbound.rule]]\nname = 'r'\naction = 'deny'\n"
    )
    one.look()
    one.adopt()
    before, now = one.started.settings, one.settings()
    assert (now.drain_timeout, now.inbound.backend) == (before.drain_timeout, None)
    assert (now.log.access, now.log.level) == ("all", "debug")
    assert [rule.name for rule in now.inbound.rules] == ["r"]
    assert now.inbound.allow != before.inbound.allow


def test_a_mistake_leaves_what_is_in_effect(file: Path) -> None:
    one = reread(file, "[inbound]\nallow = 'self'\n")
    file.write_text("[inbound]\nallow = 'nonsense'\n")
    one.look()
    one.adopt()
    assert one.current is one.started


def test_what_the_workers_refuse_is_never_adopted(file: Path) -> None:
    one = reread(file)
    file.write_text("[inbound]\nallow = 'self'\n")
    one.look()
    file.write_text("[inbound]\npolicy_mode = 'audit'\n")
    one.look()
    one.adopt()
    assert one.settings().inbound.allow == one.started.settings.inbound.allow
    assert one.settings().inbound.policy_mode == "audit"
    adopted = one.current
    one.adopt()
    assert one.current is adopted, "the second worker's word changes nothing"


def test_the_supervisors_own_log_follows(file: Path) -> None:
    one = reread(file)
    file.write_text("[log]\nlevel = 'error'\n")
    one.look()
    one.adopt()
    assert logging.getLogger("dstack_mesh").level == logging.ERROR
