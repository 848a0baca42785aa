from __future__ import annotations

from pathlib import Path

import pytest

from dstack_mesh.settings import toml_file
from dstack_mesh.settings.errors import SettingsError


def _read(tmp_path: Path, text: str) -> dict[str, str]:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    return toml_file.read(file).values


def _error(tmp_path: Path, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        _read(tmp_path, text)
    message = str(caught.value)
    assert message.isprintable()
    assert "mesh.toml" in message
    return message


def test_keys_of_all_types_become_text(tmp_path: Path) -> None:
    text = """
        drain_timeout = 2.5
        max_connections = 5
        [outbound]
        listen = "off"
        default_port = 8443
        [inbound]
        allow = ["self", "ab"]
    """
    assert _read(tmp_path, text) == {
        "drain_timeout": "2.5",
        "max_connections": "5",
        "outbound.listen": "off",
        "outbound.default_port": "8443",
        "inbound.allow": "self,ab",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[outbound]\nlisen = 1", ["outbound.lisen", "is 1", "outbound.listen"]),
        ("wrokers = 4", ["wrokers", "is 4", "no such key", "workers"]),
        ("[inbund]\nallow = 1", ["inbund", "nearest"]),
        ("[[inbound.rle]]\nname = 'x'", ["inbound.rle", "no such key", "is inbound.rule"]),
        ("[[inbund.rule]]\nname = 'x'", ["inbund", "no such key"]),
        ("outbound = 1", ["outbound in", "is 1", "accepted is a table"]),
        ("[tls]\nmin_version = 1.3", ["tls.min_version", "1.3", "a string: 1.2 or 1.3"]),
        ("[outbound]\ndefault_port = true", ["outbound.default_port", "True", "1 to 65535"]),
        ("[inbound]\nallow = [1]", ["inbound.allow", "[1]", "a list of strings"]),
        ("[log]\nlevel = ['info']", ["log.level", "debug, info, warning or error"]),
        ("drain_timeout = {}", ["drain_timeout", "{}", "30s"]),
        ("a = ]", ["not valid TOML", "line 1"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, said: list[str]) -> None:
    message = _error(tmp_path, text)
    assert [part for part in said if part not in message] == []


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: cannot be read: No such file"):
        toml_file.read(tmp_path / "none.toml")
    (tmp_path / "latin").write_bytes(b"a = '\xe4'")
    with pytest.raises(SettingsError, match="not UTF-8 at byte 5"):
        toml_file.read(tmp_path / "latin")


RUST = """
[client]
enabled = true
address = "0.0.0.0"
port = 8091

[auth]
enabled = true
address = "0.0.0.0"
port = 8092

[dstack]
gateway_domain = "gateway.example.com"

[tls]
cert_file = "/etc/ssl/certs/server.crt"
key_file = "/etc/ssl/private/server.key"
ca_file = "/etc/ssl/certs/ca.crt"
"""


def test_the_rust_meshs_file_is_accepted_as_it_is(tmp_path: Path) -> None:
    assert _read(tmp_path, RUST) == {
        "outbound.listen": "0.0.0.0:8091",
        "inbound.mode": "nginx",
        "inbound.auth_listen": "0.0.0.0:8092",
        "dstack.gateway_domain": "gateway.example.com",
        "tls.cert_file": "/etc/ssl/certs/server.crt",
        "tls.key_file": "/etc/ssl/private/server.key",
        "tls.ca_file": "/etc/ssl/certs/ca.crt",
    }


def test_what_the_rust_meshs_start_script_left_empty_is_not_set(tmp_path: Path) -> None:
    # Its script writes `gateway_domain = "${DSTACK_GATEWAY_DOMAIN}"`, whatever that is.
    text = RUST
    for value in ("gateway.example.com", "/etc/ssl/certs/server.crt", "127.0.0.1", "0.0.0.0"):
        text = text.replace(f'"{value}"', '""')
    assert _read(tmp_path, text) == {
        "outbound.listen": "127.0.0.1:8091",
        "inbound.mode": "nginx",
        "inbound.auth_listen": "127.0.0.1:8092",
        "tls.key_file": "/etc/ssl/private/server.key",
        "tls.ca_file": "/etc/ssl/certs/ca.crt",
    }


def test_an_empty_string_of_our_own_keys_stays_to_be_judged(tmp_path: Path) -> None:
    text = "[inbound]\nallow = ''\nbackend = ''\n[tls]\nlifetime = ''"
    assert _read(tmp_path, text) == {
        "inbound.allow": "",
        "inbound.backend": "",
        "tls.lifetime": "",
    }


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("[client]\nenabled = false\nport = 1", "off"),
        ("[client]\nport = 81", "127.0.0.1:81"),
        ("[client]\naddress = '::1'", "[::1]:8091"),
    ],
)
def test_client_is_the_outbound_listener(tmp_path: Path, text: str, listen: str) -> None:
    assert _read(tmp_path, text) == {"outbound.listen": listen}


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("[auth]\nenabled = true", "127.0.0.1:8092"),
        ("[auth]\nport = 81", "127.0.0.1:81"),
        ("[auth]\naddress = '::1'", "[::1]:8092"),
    ],
)
def test_auth_is_nginx_mode(tmp_path: Path, text: str, listen: str) -> None:
    assert _read(tmp_path, text) == {"inbound.mode": "nginx", "inbound.auth_listen": listen}


def test_auth_that_is_off_says_nothing(tmp_path: Path) -> None:
    assert _read(tmp_path, "[auth]\nenabled = false\nport = 1") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[client]\nprt = 1", ["client.prt", "enabled, address, port"]),
        ("[client]\nport = '1'", ["client.port", '"1"', "a whole number"]),
        ("[client]\nport = true", ["client.port", "True", "a whole number"]),
        ("[auth]\nenabled = 1", ["auth.enabled", "is 1", "true or false"]),
        ("client = 1", ["client", "accepted is a table"]),
        ("[client]\nport = 1\n[outbound]\nlisten = 'off'", ["outbound.listen", "[client]"]),
        ("[auth]\nport = 1\n[inbound]\nmode = 'embedded'", ["inbound.mode", "[auth]"]),
        ("[auth]\nport = 1\n[inbound]\nauth_listen = 'a:1'", ["inbound.auth_listen", "[auth]"]),
    ],
)
def test_a_wrong_rust_file_is_an_error(tmp_path: Path, text: str, said: list[str]) -> None:
    message = _error(tmp_path, text)
    assert [part for part in said if part not in message] == []


def test_nearest_always_names_one() -> None:
    assert toml_file.nearest("MESH_GATWAY", ["MESH_BACKEND", "MESH_GATEWAY"]) == "MESH_GATEWAY"
    assert toml_file.nearest("x", ["MESH_BACKEND"]) == "MESH_BACKEND"
