from __future__ import annotations

import dataclasses

import pytest

from dstack_mesh.model import (
    AppId,
    AppInfo,
    InstanceId,
    PeerIdentity,
    Role,
    Target,
    TcpAddress,
    UnixAddress,
)

APP = AppId("aa" * 20)
VALUES = [
    AppInfo(APP, "00", "11", "22", "33"),
    PeerIdentity(APP, 4_000_000_000.0),
    Target(APP, 443),
    TcpAddress("127.0.0.1", 80),
    UnixAddress("/run/x.sock"),
]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (TcpAddress("127.0.0.1", 8091), "127.0.0.1:8091"),
        (TcpAddress("gateway.example", 443), "gateway.example:443"),
        (TcpAddress("::1", 8091), "[::1]:8091"),
        (TcpAddress("::", 0), "[::]:0"),
        (UnixAddress("/run/dstack.sock"), "unix:/run/dstack.sock"),
    ],
)
def test_an_address_is_shown_as_the_settings_write_it(
    address: TcpAddress | UnixAddress, text: str
) -> None:
    assert str(address) == text


@pytest.mark.parametrize("value", VALUES, ids=lambda one: type(one).__name__)
def test_values_are_frozen_and_equal_by_what_they_say(value: object) -> None:
    assert dataclasses.is_dataclass(value)
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, "changed")
    same = dataclasses.replace(value)  # type: ignore[type-var]
    assert same == value
    assert hash(same) == hash(value)
    assert same is not value


def test_what_tells_two_targets_apart() -> None:
    instance = InstanceId("11" * 20)
    targets = {Target(APP, 443), Target(APP, 80), Target(APP, 443, instance), Target(APP, 443)}
    assert len(targets) == 3


def test_roles() -> None:
    assert {role.value for role in Role} == {"target", "caller"}
