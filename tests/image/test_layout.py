from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dstack_mesh.image.layout import LayoutError, Owner, file_system, make_directory, make_state

MOUNTS = """\
overlay / overlay rw 0 0
proc /proc proc rw 0 0
shm /dev/shm tmpfs rw 0 0
/dev/sda /data ext4 rw 0 0
tmpfs /data tmpfs rw 0 0
/dev/sdb /dev/shm-not ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/shm/dstack-mesh", "tmpfs"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shm-not/x", "ext4"),
        ("/data/x", "tmpfs"),
        ("/run/x", "overlay"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert file_system(path, MOUNTS) == kind


def test_a_key_is_never_put_on_a_disk(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"would be on overlay, .*mount a tmpfs on"):
        make_state(tmp_path / "state", "overlay / overlay rw 0 0\n")
    assert not (tmp_path / "state").exists()


def test_what_an_earlier_run_left_is_gone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "identity").mkdir(parents=True)
    (state / "identity" / "key.pem").touch()
    make_state(state, "tmpfs / tmpfs rw 0 0\n")
    assert list(state.iterdir()) == []
    assert stat.S_IMODE(state.stat().st_mode) == 0o711


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="cannot be made"):
        make_state(tmp_path / "not" / "there", "tmpfs / tmpfs rw 0 0\n")


def test_a_directory_gets_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        make_directory(tmp_path / "a", Owner(os.geteuid(), os.getegid()), 0o2710)
        make_directory(tmp_path / "b", None, 0o700)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o2710
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700
