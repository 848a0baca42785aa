"""Which backend a request goes to."""

from __future__ import annotations

import pytest

from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.policy.path import PathError
from dstack_mesh.policy.route import NO_ROUTES, Route, Routes, host_name

ONE, TWO, THREE = TcpAddress("one", 1), TcpAddress("two", 2), UnixAddress("/three")
ROUTES = Routes(
    (
        Route(ONE, host="vpc-server", path="/api/*"),
        Route(TWO, host="vpc-server"),
        Route(THREE, path="/files/**"),
        Route(ONE, path="/**", host="[::1]"),
    )
)


@pytest.mark.parametrize(
    ("host", "target", "backend"),
    [
        (b"vpc-server", b"/api/x?y=//", ONE),
        (b"VPC-Server:8080", b"/%61pi/x", ONE),
        (b"vpc-server.", b"/api/x", ONE),
        (b"vpc-server.:80", b"/api/x", ONE),
        (b"vpc-server:", b"/api/x", ONE),
        (b"vpc-server", b"/api/x/y", TWO),
        (b"vpc-server", b"/files/x", TWO),
        (b"vpc-server", b"*", TWO),
        (b"vpc-server2", b"/files", THREE),
        (b"x.vpc-server", b"/files/a/b", THREE),
        (None, b"/files/a/b", THREE),
        (b"", b"/files/a/b", THREE),
        (b"other", b"/filesx", None),
        (b"other", b"/api/x", None),
        (None, b"/api/x", None),
        (b"[::1]", b"/", ONE),
        (b"[::1]:443", b"/", ONE),
        (b"[::2]:443", b"/", None),
        (b"[::1]", b"*", None),
    ],
)
def test_the_first_route_that_matches(host: bytes | None, target: bytes, backend: object) -> None:
    assert ROUTES.choose(host, target) == backend


def test_a_path_that_could_mean_another_is_refused_where_a_route_goes_by_paths() -> None:
    for target in (b"/public/../api/x", b"//api/x", b"/api%2fx"):
        with pytest.raises(PathError):
            ROUTES.choose(b"vpc-server", target)
        assert Routes((Route(TWO, host="vpc-server"),)).choose(b"vpc-server", target) == TWO


def test_each_backend_is_named_once() -> None:
    assert ROUTES.backends == (ONE, TWO, THREE)
    assert NO_ROUTES.backends == NO_ROUTES.routes == ()
    assert NO_ROUTES.choose(b"x", b"//") is None


def test_a_route_needs_a_condition_that_can_be_met() -> None:
    with pytest.raises(ValueError, match="neither host nor path"):
        Route(ONE)
    with pytest.raises(ValueError, match="begin with /"):
        Route(ONE, path="api")


def test_a_hosts_name() -> None:
    said = {host: host_name(host) for host in (b"A.b", b"a:1", b"[::A]:1", b"[::1]", b"a.", b"")}
    assert list(said.values()) == [b"a.b", b"a", b"[::a]", b"[::1]", b"a", b""]
