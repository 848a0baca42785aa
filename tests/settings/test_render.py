from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from dstack_mesh.settings import render
from dstack_mesh.settings.load import load_settings
from dstack_mesh.settings.rules import TABLES
from dstack_mesh.settings.schema import SCHEMA

APP = "3f" * 20

ALL = {
    "MESH_OUTBOUND_LISTEN": "unix:/run/ä b.sock",
    "MESH_BACKEND": "http://[::1]:8080",
    "MESH_INBOUND_LISTEN": "off",
    "MESH_ALLOWED_APPS": f"{APP},self",
    "MESH_ADMIN_LISTEN": "[::1]:0",
    "MESH_GATEWAY": "gw.example.com:8443",
    "DSTACK_AGENT_ADDRESS": "http://localhost:8090",
    "MESH_SYS_CONFIG": 'C:\\a"b',
    "MESH_GATEWAY_CONNECT": "127.0.0.2:443",
    "MESH_CERT_FILE": "/c",
    "MESH_KEY_FILE": "/k",
    "MESH_CA_FILE": "/ca",
    "MESH_RESPONSE_TIMEOUT": "0",
    "MESH_HEAD_TIMEOUT": "0.25",
    "MESH_MAX_CONNECTIONS": "7",
    "MESH_TLS_MIN_VERSION": "1.2",
}


@pytest.mark.parametrize("environ", [{}, ALL, {"MESH_GATEWAY": "fixed/127.0.0.1:1"}])
def test_the_toml_gives_the_same_settings_again(environ: dict[str, str], tmp_path: Path) -> None:
    loaded = load_settings({}, environ, None, exists=lambda _path: True)
    file = tmp_path / "again.toml"
    file.write_text(render.as_toml(loaded))
    again = load_settings({}, {}, file, exists=lambda _path: True)
    assert again.settings == loaded.settings
    assert render.as_json(again).keys() == {setting.key for setting in SCHEMA} | set(TABLES)


def test_each_value_has_its_source(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[log]\nlevel = 'debug'")
    loaded = load_settings(
        {"dstack.gateway_domain": "gw.example.com"}, {"MESH_BACKEND": "app:80"}, file
    )
    lines = render.as_toml(loaded).splitlines()
    assert 'gateway_domain = "gw.example.com"  # flag --gateway' in lines
    assert 'backend = "app:80"  # env MESH_BACKEND' in lines
    assert f'level = "debug"  # file {file}' in lines
    assert "default_port = 443  # default" in lines
    assert "# gateway_connect: none  # default" in lines


def test_a_files_name_cannot_leave_the_comment(tmp_path: Path) -> None:
    file = tmp_path / "a\nbogus = 4"
    file.write_text("head_timeout = 1")
    toml = render.as_toml(load_settings({}, {}, file))
    assert "bogus" not in tomllib.loads(toml)
    assert "a\\nbogus = 4" in toml


def test_json_has_value_and_source() -> None:
    loaded = load_settings({}, {"MESH_ADMIN_LISTEN": "off"}, None)
    found = render.as_json(loaded)
    assert found["admin.listen"] == {"value": "off", "source": "env MESH_ADMIN_LISTEN"}
    assert found["max_connections"] == {"value": 10000, "source": "default"}
    assert found["inbound.backend"] == {"value": None, "source": "default"}
    assert found["idle_timeout"] == {"value": "5m", "source": "default"}


def test_the_table_has_a_row_for_each_setting() -> None:
    rows = render.as_markdown().splitlines()
    assert len(rows) == len(SCHEMA) + 2
    assert {row.count(" | ") for row in rows if row.startswith("| ")} == {5}
