from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dstack_mesh.identity.tls import Credentials
from dstack_mesh.image.identity_files import IdentityFiles
from dstack_mesh.image.layout import Owner
from dstack_mesh.model import AppId
from dstack_mesh.sim.kms import Kms

APP = AppId("ab" * 20)


@pytest.fixture
def make() -> Callable[[], Credentials]:
    kms = Kms.create()

    def one() -> Credentials:
        issued = kms.issue(APP)
        return Credentials(issued.key_pem, tuple(issued.chain_pem), kms.root_pem)

    return one


def test_a_generation_is_complete(tmp_path: Path, make: Callable[[], Credentials]) -> None:
    files, ours = IdentityFiles(tmp_path, Owner(os.geteuid(), os.getegid())), make()
    assert files.switch(ours)
    assert (files.current / "key.pem").read_bytes() == ours.key_pem
    # Leaf and app CA: the root need not be sent, a caller has it.
    assert (files.current / "cert.pem").read_bytes() == b"".join(ours.chain_pem[:2])
    assert files.ca_file.read_bytes() == ours.root_pem


def test_only_its_reader_can_read_the_key(tmp_path: Path, make: Callable[[], Credentials]) -> None:
    before = os.umask(0)
    try:
        files = IdentityFiles(tmp_path, None)
        files.switch(make())
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files.current.iterdir()}
    assert modes == {"key.pem": 0o600, "cert.pem": 0o640}
    assert stat.S_IMODE(files.current.stat().st_mode) == 0o750


def test_the_switch_is_one_step(tmp_path: Path, make: Callable[[], Credentials]) -> None:
    """Whoever has resolved the link reads key and certificate of one generation, also after it."""
    files, first, second = IdentityFiles(tmp_path, None), make(), make()
    files.switch(first)
    seen = files.current.resolve()
    assert not files.switch(second)
    assert (seen / "key.pem").read_bytes() == first.key_pem
    assert (files.current / "key.pem").read_bytes() == second.key_pem


def test_generations_do_not_pile_up(tmp_path: Path, make: Callable[[], Credentials]) -> None:
    files = IdentityFiles(tmp_path, None)
    for _ in range(5):
        files.switch(make())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5", "ca.pem", "current"]


def test_what_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, make: Callable[[], Credentials]
) -> None:
    files, first = IdentityFiles(tmp_path, None), make()
    files.switch(first)
    (tmp_path / "2").touch()  # where the next one is to go
    with pytest.raises(FileExistsError):
        files.switch(make())
    assert (files.current / "key.pem").read_bytes() == first.key_pem
    (tmp_path / "2").unlink()
    second = make()
    files.switch(second)
    assert (files.current / "key.pem").read_bytes() == second.key_pem


def test_a_root_made_anew_is_told(tmp_path: Path) -> None:
    kms = Kms.create()
    files = IdentityFiles(tmp_path, None)
    told = []
    for _ in range(2):
        issued = kms.issue(APP)
        ours = Credentials(issued.key_pem, tuple(issued.chain_pem), kms.root_pem)
        told += [files.switch(ours), files.switch(ours)]
        kms.remake_root()
    assert told == [True, False, True, False]
