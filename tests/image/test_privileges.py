from __future__ import annotations

import pytest

from dstack_mesh.image.privileges import User, as_user, needs_low_ports
from dstack_mesh.model import Address, TcpAddress, UnixAddress


def test_nothing_is_kept() -> None:
    line = as_user(User(8091, 8092), ["mesh", "run"])
    assert line[0] == "setpriv"
    assert line[-3:] == ["--", "mesh", "run"]
    assert {"--reuid=8091", "--regid=8092", "--clear-groups", "--no-new-privs"} <= set(line)
    for kind in ("inh", "ambient", "bounding"):
        suffix = "set" if kind == "bounding" else "caps"
        assert f"--{kind}-{suffix}=-all" in line


def test_groups_beside_its_own() -> None:
    line = as_user(User(1, 2, frozenset({999, 2, 50})), ["x"])
    assert "--groups=50,999" in line
    assert "--clear-groups" not in line


def test_one_capability_for_low_ports() -> None:
    line = as_user(User(1, 2), ["x"], low_ports=True)
    assert [part for part in line if "+" in part] == [
        "--inh-caps=-all,+net_bind_service",
        "--ambient-caps=-all,+net_bind_service",
        "--bounding-set=-all,+net_bind_service",
    ]


@pytest.mark.parametrize(
    ("addresses", "first", "needed"),
    [
        ([TcpAddress("0.0.0.0", 80)], 1024, True),
        ([TcpAddress("0.0.0.0", 80)], 0, False),
        ([TcpAddress("0.0.0.0", 80)], 80, False),
        ([TcpAddress("0.0.0.0", 8080), None, UnixAddress("/a")], 1024, False),
        ([TcpAddress("0.0.0.0", 8080), TcpAddress("0.0.0.0", 443)], 1024, True),
        ([TcpAddress("0.0.0.0", 0)], 1024, False),
    ],
)
def test_which_ports_need_it(addresses: list[Address | None], first: int, needed: bool) -> None:
    assert needs_low_ports(addresses, first) is needed


def test_what_this_kernel_says() -> None:
    assert needs_low_ports([TcpAddress("0.0.0.0", 65_535)]) is False
