"""Loopback addresses and free ports."""

from __future__ import annotations

import socket

import pytest

from dstack_mesh.model import AppId
from dstack_mesh.sim.ports import common_port, is_local, loopback_host


def test_host_is_the_same_each_time_and_nobody_elses() -> None:
    app_id = AppId("ff" * 20)
    first = loopback_host(app_id, ())
    assert first == loopback_host(app_id, ())
    assert first.startswith("127.")
    assert is_local(first)
    second = loopback_host(app_id, {first})
    assert second != first
    assert is_local(second)


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_host_is_never_one_that_others_use(byte: int) -> None:
    host = loopback_host(AppId(f"{byte:02x}" * 20), ())
    assert not host.startswith("127.0.0.")
    last = int(host.rsplit(".", 1)[1])
    assert 2 <= last <= 254


def test_port_is_free_on_every_host() -> None:
    hosts = ["127.4.4.4", "127.4.4.5"]
    port = common_port(hosts)
    listeners = [socket.create_server((host, port)) for host in hosts]
    for listener in listeners:
        listener.close()
    assert common_port(["127.0.0.1"], {port}) != port


def test_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.4.4.4", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr("dstack_mesh.sim.ports._FIRST", port)
        monkeypatch.setattr("dstack_mesh.sim.ports._LAST", port)
        with pytest.raises(OSError, match="no TCP port"):
            common_port(["127.4.4.5", "127.4.4.4"])
        assert common_port(["127.4.4.5"]) == port


def test_foreign_address_is_not_local() -> None:
    assert not is_local("192.0.2.1")
    assert not is_local("no.such.host.invalid")
    with pytest.raises(OSError, match="not an address of this machine"):
        common_port(["192.0.2.1"])
