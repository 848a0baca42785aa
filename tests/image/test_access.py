from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstack_mesh.image.access import READ, WRITE, Access, access

SOCKET = "/run/d/agent.sock"


def found(**modes: tuple[int, int, int]) -> object:
    """Give a `stat` of made-up files: (mode, user, group) by `socket`, `directory`; others open."""

    def one(path: str) -> os.stat_result:
        default = (0o755, 0, 0)
        if path == SOCKET:
            mode, uid, gid = modes.get("socket", default)
        elif path == str(Path(SOCKET).parent):
            mode, uid, gid = modes.get("directory", default)
        else:
            mode, uid, gid = default
        return os.stat_result((mode, 0, 0, 0, uid, gid, 0, 0, 0, 0))

    return one


def asked(bit: int = WRITE, **modes: tuple[int, int, int]) -> Access | None:
    return access(SOCKET, bit, found(**modes))  # type: ignore[arg-type]


def test_open_to_everybody() -> None:
    assert asked(socket=(0o666, 0, 0)) == Access()
    assert asked(socket=(0o777, 5, 6)) == Access()
    assert asked(READ, socket=(0o644, 0, 0)) == Access()


def test_open_to_a_group() -> None:
    assert asked(socket=(0o660, 0, 999)) == Access(frozenset({999}))
    assert asked(READ, socket=(0o640, 0, 999)) == Access(frozenset({999}))


def test_open_to_a_group_behind_anothers_directory() -> None:
    both = asked(socket=(0o660, 0, 999), directory=(0o750, 0, 50))
    assert both == Access(frozenset({999, 50}))


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o644, 0o700, 0o640])
def test_a_socket_that_only_its_owner_may_write_to(mode: int) -> None:
    """0755 is what a server makes under the usual umask: to connect is to write."""
    assert asked(socket=(mode, 0, 999)) == Access(only_by=(0, 999))
    assert asked(socket=(mode, 1234, 5)) == Access(only_by=(1234, 5))


def test_roots_group_is_as_good_as_root() -> None:
    assert asked(socket=(0o660, 0, 0)) == Access(only_by=(0, 0))


def test_a_directory_that_only_its_owner_may_enter() -> None:
    assert asked(socket=(0o666, 0, 0), directory=(0o700, 0, 0)) == Access(only_by=(0, 0))


def test_what_is_not_there() -> None:
    assert access("/nowhere/at/all", READ) is None


def test_a_real_file_through_a_link(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    file = closed / "file"
    file.touch()
    file.chmod(0o644)
    link = tmp_path / "link"
    link.symlink_to(file)
    closed.chmod(0o700)
    owner = file.stat()
    assert access(str(link), READ) == Access(only_by=(owner.st_uid, owner.st_gid))
