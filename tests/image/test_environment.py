from __future__ import annotations

import pytest

from dstack_mesh.image.environment import DEFAULTS, with_defaults, with_older_names
from dstack_mesh.settings.load import Loaded, load_settings


def load(environ: dict[str, str], flags: dict[str, str] | None = None) -> Loaded:
    return load_settings(flags or {}, environ, None, exists=lambda path: True)


def effective(environ: dict[str, str], flags: dict[str, str] | None = None) -> Loaded:
    return load(with_defaults(environ, load(environ, flags).sources), flags)


def test_the_images_listeners() -> None:
    settings = effective({}).settings
    assert str(settings.outbound.listen) == "0.0.0.0:80"
    assert str(settings.inbound.listen) == "0.0.0.0:443"
    assert str(settings.inbound.auth_listen) == "unix:/dev/shm/dstack-mesh/auth/auth.sock"
    assert str(settings.admin.listen) == "127.0.0.1:8093"


@pytest.mark.parametrize("by", ["environment", "flag"])
def test_what_is_set_beats_the_images_defaults(by: str) -> None:
    given = {"outbound.listen": "127.0.0.1:1", "inbound.listen": "127.0.0.1:2"}
    names = {"outbound.listen": "MESH_OUTBOUND_LISTEN", "inbound.listen": "MESH_INBOUND_LISTEN"}
    environ = {names[key]: value for key, value in given.items()} if by == "environment" else {}
    settings = effective(environ, given if by == "flag" else None).settings
    assert str(settings.outbound.listen) == "127.0.0.1:1"
    assert str(settings.inbound.listen) == "127.0.0.1:2"
    assert str(settings.inbound.auth_listen) == DEFAULTS["inbound.auth_listen"]


def test_names_of_the_first_rust_image() -> None:
    environ = with_older_names(
        {"BACKEND": "app:8080", "GATEWAY_DOMAIN": "g.example:8443", "A": "b"}
    )
    assert environ == {"MESH_BACKEND": "app:8080", "MESH_GATEWAY": "g.example:8443", "A": "b"}
    assert str(load(environ).settings.inbound.backend) == "app:8080"


@pytest.mark.parametrize("name", ["MESH_BACKEND", "DSTACK_MESH_BACKEND"])
def test_todays_names_win(name: str) -> None:
    environ = with_older_names({"BACKEND": "older:1", name: "today:2"})
    assert str(load(environ).settings.inbound.backend) == "today:2"


def test_an_empty_one_is_not_set() -> None:
    assert with_older_names({"BACKEND": ""}) == {}
    assert with_older_names({"BACKEND": "b:1", "MESH_BACKEND": ""}) == {"MESH_BACKEND": "b:1"}
