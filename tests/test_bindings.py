from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_mesh import listen
from dstack_mesh.bindings import bind_all, bound_addresses
from dstack_mesh.settings.load import load_settings
from dstack_mesh.settings.tree import Settings

FREE = "127.0.0.1:0"


def settings(**environ: str) -> Settings:
    listeners = {"MESH_OUTBOUND_LISTEN": FREE, "MESH_ADMIN_LISTEN": FREE}
    return load_settings({}, {**listeners, **environ}, None).settings


@pytest.fixture
def sockets() -> Iterator[dict[str, listen.ListeningSocket]]:
    found: dict[str, listen.ListeningSocket] = {}
    yield found
    for sock in found.values():
        sock.close()


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, {"outbound", "admin"}),
        ({"MESH_OUTBOUND_LISTEN": "off"}, {"admin"}),
        ({"MESH_ADMIN_LISTEN": "off"}, {"outbound"}),
        (
            {"MESH_BACKEND": "127.0.0.1:1", "MESH_INBOUND_LISTEN": FREE},
            {"outbound", "admin", "inbound"},
        ),
        ({"MESH_INBOUND_MODE": "nginx", "MESH_AUTH_LISTEN": FREE}, {"outbound", "admin", "auth"}),
    ],
)
def test_which_there_are(
    sockets: dict[str, listen.ListeningSocket], environ: dict[str, str], names: set[str]
) -> None:
    bind_all(settings(**environ), sockets)
    assert set(sockets) == names
    bound = bound_addresses(sockets)
    assert list(bound) == ["outbound", "inbound", "auth", "admin"]
    assert {name for name, address in bound.items() if address is not None} == names
    for name in names:
        host, _, port = str(bound[name]).rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()


def test_those_bound_before_one_failed_are_there_to_be_closed(
    sockets: dict[str, listen.ListeningSocket], tmp_path: Path
) -> None:
    path = tmp_path / "outbound.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        one = settings(MESH_OUTBOUND_LISTEN=f"unix:{path}", MESH_ADMIN_LISTEN=address)
        with pytest.raises(listen.ListenError, match=address):
            bind_all(one, sockets)
    assert set(sockets) == {"outbound"}
    listen.unlink_if_ours(sockets["outbound"])
    assert not path.exists()
