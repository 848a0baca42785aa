from __future__ import annotations

from pathlib import Path

import pytest

from dstack_mesh.gateway_domain import FixedGateway, GatewayDomain
from dstack_mesh.model import AppId, TcpAddress, UnixAddress
from dstack_mesh.policy.allow import Allow
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import Loaded, load_settings, value_of
from dstack_mesh.settings.rules import TABLES
from dstack_mesh.settings.schema import AGENT_PATHS, SCHEMA

APP = "3f" * 20


def _load(
    environ: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
    file: Path | None = None,
    present: tuple[str, ...] = AGENT_PATHS,
) -> Loaded:
    return load_settings(flags or {}, environ or {}, file, exists=present.__contains__)


def _error(
    environ: dict[str, str] | None = None,
    flags: dict[str, str] | None = None,
    file: Path | None = None,
) -> str:
    with pytest.raises(SettingsError) as caught:
        _load(environ, flags, file)
    message = str(caught.value)
    assert message.isprintable()
    return message


def _file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    return file


def test_the_contracts_defaults() -> None:
    loaded = _load()
    settings = loaded.settings
    assert settings.outbound.listen == TcpAddress("127.0.0.1", 8091)
    assert settings.outbound.default_port == 443
    assert settings.outbound.agent == "all"
    assert settings.outbound.connect_timeout == 10
    assert settings.outbound.response_timeout == 60
    assert settings.inbound.backend is None
    assert settings.inbound.mode == "embedded"
    assert settings.inbound.listen == TcpAddress("0.0.0.0", 8443)
    assert settings.inbound.auth_listen == TcpAddress("127.0.0.1", 8092)
    assert settings.inbound.server_name == "_"
    assert settings.inbound.allow == Allow(anyone=True)
    assert settings.inbound.policy_mode == "enforce"
    assert settings.inbound.rules == settings.inbound.routes == ()
    assert settings.admin.listen == TcpAddress("127.0.0.1", 8093)
    assert settings.dstack.gateway_domain is None
    assert settings.dstack.agent == UnixAddress("/var/run/dstack/dstack.sock")
    assert settings.dstack.sys_config == "/dstack/.host-shared/.sys-config.json"
    assert settings.dstack.gateway_connect is None
    assert settings.tls.cert_file is settings.tls.key_file is settings.tls.ca_file is None
    assert settings.tls.lifetime == 86400
    assert settings.tls.min_version == "1.3"
    assert (settings.log.format, settings.log.level) == ("json", "info")
    assert (settings.drain_timeout, settings.idle_timeout, settings.head_timeout) == (30, 300, 15)
    assert settings.max_connections == 10000
    assert loaded.warnings == ()
    assert {str(source) for source in loaded.sources.values()} == {"default"}
    assert loaded.sources.keys() == {setting.key for setting in SCHEMA} | set(TABLES)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = _file(tmp_path, "head_timeout = 1\nidle_timeout = 1\ndrain_timeout = 1")
    loaded = _load(
        {"MESH_HEAD_TIMEOUT": "2", "MESH_IDLE_TIMEOUT": "2"}, {"head_timeout": "3"}, file
    )
    settings = loaded.settings
    assert (settings.head_timeout, settings.idle_timeout, settings.drain_timeout) == (3, 2, 1)
    assert str(loaded.sources["head_timeout"]) == "flag --head-timeout"
    assert str(loaded.sources["idle_timeout"]) == "env MESH_IDLE_TIMEOUT"
    assert str(loaded.sources["drain_timeout"]) == f"file {file}"
    assert str(loaded.sources["max_connections"]) == "default"


def test_the_newer_name_of_a_variable_wins() -> None:
    loaded = _load({"DSTACK_MESH_BACKEND": "old:1", "MESH_BACKEND": "new:2"})
    assert loaded.settings.inbound.backend == TcpAddress("new", 2)
    older = _load({"DSTACK_MESH_BACKEND": "old:1", "DSTACK_GATEWAY_DOMAIN": "gw.example.com"})
    assert older.settings.inbound.backend == TcpAddress("old", 1)
    assert older.settings.dstack.gateway_domain == GatewayDomain("gw.example.com")
    assert str(older.sources["inbound.backend"]) == "env DSTACK_MESH_BACKEND"


NOT_RESTRICTING = [
    name for setting in SCHEMA if not setting.restricts for name in setting.env
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_RESTRICTING)
def test_an_empty_variable_counts_as_not_set(name: str) -> None:
    loaded = _load({name: ""})
    assert loaded.settings == _load().settings
    assert {str(source) for source in loaded.sources.values()} == {"default"}
    assert loaded.warnings == ()


def test_behind_an_empty_variable_the_older_name_and_the_file_count(tmp_path: Path) -> None:
    file = _file(tmp_path, "head_timeout = 1")
    environ = {"MESH_BACKEND": "", "DSTACK_MESH_BACKEND": "old:1", "MESH_HEAD_TIMEOUT": ""}
    loaded = _load(environ, file=file)
    assert loaded.settings.inbound.backend == TcpAddress("old", 1)
    assert loaded.settings.head_timeout == 1


def test_white_space_is_not_empty() -> None:
    assert 'MESH_GATEWAY is " "' in _error({"MESH_GATEWAY": " "})


def test_values_of_types_of_their_own() -> None:
    settings = _load(
        {
            "MESH_GATEWAY": "fixed/127.0.0.1:8443",
            "MESH_ALLOWED_APPS": f"self, {APP.upper()}",
            "DSTACK_AGENT_ADDRESS": "http://localhost:8090",
            "MESH_RESPONSE_TIMEOUT": "0",
            "MESH_ADMIN_LISTEN": "off",
        }
    ).settings
    assert settings.dstack.gateway_domain == FixedGateway(TcpAddress("127.0.0.1", 8443))
    assert settings.inbound.allow == Allow(own=True, apps=frozenset({AppId(APP)}))
    assert settings.dstack.agent == TcpAddress("localhost", 8090)
    assert settings.outbound.response_timeout == 0
    assert settings.admin.listen is None


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({"MESH_DEFAULT_PORT": "0"}, {}, 'MESH_DEFAULT_PORT is "0": accepted is a port from 1'),
        ({}, {"tls.min_version": "1.1"}, '--tls-min-version is "1.1": accepted is 1.2 or 1.3'),
        ({"MESH_ALLOWED_APPS": ""}, {}, 'MESH_ALLOWED_APPS is "": it is empty: accepted are any'),
        ({"DSTACK_MESH_BACKEND": "x"}, {}, 'DSTACK_MESH_BACKEND is "x": accepted is host:port'),
        ({"MESH_GATEWAY": "https://x.y"}, {}, "is a URL"),
        ({"MESH_GATEWAY": "x y"}, {}, "base.domain[:port] or fixed/host:port"),
        ({"MESH_INBOUND_MODE": "nginx "}, {}, 'is "nginx ": accepted is embedded, nginx or off'),
        ({"MESH_AUTH_LISTEN": "off"}, {}, 'MESH_AUTH_LISTEN is "off": accepted is host:port'),
        ({"MESH_AGENT_EXPOSE": ""}, {}, 'MESH_AGENT_EXPOSE is "": accepted is all, info or'),
        ({}, {"inbound.backend": ""}, '--backend is "": accepted is host:port'),
        ({"MESH_SERVER_NAME": "a; include /etc/x"}, {}, "accepted is host names"),
        ({"DSTACK_MESH_SERVER_NAME": "~^a$"}, {}, 'DSTACK_MESH_SERVER_NAME is "~^a$"'),
        ({"MESH_LOG_LEVEL": "loud\n"}, {}, 'is "loud\\n": accepted is debug, info'),
    ],
)
def test_a_bad_value_is_named_as_its_writer_did(
    environ: dict[str, str], flags: dict[str, str], said: str
) -> None:
    assert said in _error(environ, flags)


def test_a_bad_value_in_the_file_names_key_and_file(tmp_path: Path) -> None:
    file = _file(tmp_path, "[log]\nformat = 'xml'")
    assert _error(file=file) == f'log.format in {file} is "xml": accepted is json or text'


def test_a_bad_value_is_an_error_also_where_another_wins(tmp_path: Path) -> None:
    file = _file(tmp_path, "[log]\nformat = 'xml'")
    assert "log.format" in _error({"MESH_LOG_FORMAT": "json"}, file=file)


@pytest.mark.parametrize("name", ["MESH_KEY_FILE", "MESH_GATEWAY", "MESH_ALLOWED_APPS"])
def test_a_key_given_for_a_value_is_never_repeated(name: str) -> None:
    message = _error({name: "-----BEGIN PRIVATE KEY-----\nMIGHAgEA"})
    assert message.startswith(f"{name} is [redacted]: ")
    assert "MIGH" not in message
    assert "PRIVATE" not in message


def test_an_unknown_variable_is_a_warning_with_the_nearest() -> None:
    loaded = _load({"MESH_GATWAY": "x", "MESHES": "x", "PATH": "x"})
    assert loaded.warnings == ("MESH_GATWAY is not a setting; the nearest known is MESH_GATEWAY",)


def test_identity_files_come_all_three_or_none() -> None:
    message = _error({"MESH_CERT_FILE": "c.pem", "MESH_CA_FILE": "ca.pem"})
    assert message.startswith('MESH_CERT_FILE is "c.pem" without tls.key_file: accepted are')


def test_an_identity_file_that_is_not_there_is_said() -> None:
    environ = {"MESH_CERT_FILE": "c.pem", "MESH_KEY_FILE": "k.pem", "MESH_CA_FILE": "ca.pem"}
    with pytest.raises(SettingsError, match=r'MESH_KEY_FILE is "k\.pem": there is no such file'):
        _load(environ, present=("c.pem", "ca.pem"))
    tls = _load(environ, present=("c.pem", "k.pem", "ca.pem")).settings.tls
    assert (tls.cert_file, tls.key_file, tls.ca_file) == ("c.pem", "k.pem", "ca.pem")


def test_two_listeners_cannot_have_one_address() -> None:
    message = _error({"MESH_ADMIN_LISTEN": "127.0.0.1:1"}, {"outbound.listen": "127.0.0.1:1"})
    assert message.startswith('MESH_ADMIN_LISTEN is "127.0.0.1:1", and so is --outbound-listen')
    unix = {"MESH_ADMIN_LISTEN": "unix:/a", "MESH_OUTBOUND_LISTEN": "unix:/a"}
    assert "unix:/a" in _error(unix)


@pytest.mark.parametrize(
    "environ",
    [
        {"MESH_ADMIN_LISTEN": "127.0.0.1:0", "MESH_OUTBOUND_LISTEN": "127.0.0.1:0"},
        {"MESH_ADMIN_LISTEN": "off", "MESH_OUTBOUND_LISTEN": "off"},
        {"MESH_OUTBOUND_LISTEN": "0.0.0.0:8443"},
        {"MESH_OUTBOUND_LISTEN": "127.0.0.1:8092", "MESH_BACKEND": "a:1"},
        {
            "MESH_OUTBOUND_LISTEN": "0.0.0.0:8443",
            "MESH_BACKEND": "a:1",
            "MESH_INBOUND_MODE": "nginx",
        },
        {
            "MESH_OUTBOUND_LISTEN": "0.0.0.0:8443",
            "MESH_BACKEND": "a:1",
            "MESH_INBOUND_MODE": "off",
        },
    ],
)
def test_listeners_that_do_not_meet(environ: dict[str, str]) -> None:
    assert _load(environ).warnings == ()


def test_inbound_meets_outbound_only_when_it_is_on() -> None:
    environ = {"MESH_OUTBOUND_LISTEN": "0.0.0.0:8443", "MESH_BACKEND": "a:1"}
    assert "inbound.listen" in _error(environ)


def test_in_nginx_mode_the_auth_service_needs_its_address() -> None:
    environ = {"MESH_OUTBOUND_LISTEN": "127.0.0.1:8092", "MESH_INBOUND_MODE": "nginx"}
    assert "inbound.auth_listen" in _error(environ)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("0.0.0.0:8092", True),
        ("[::]:8092", True),
        ("mesh:8092", True),
        ("127.0.0.1:8092", False),
        ("127.9.9.9:8092", False),
        ("[::1]:8092", False),
        ("localhost:8092", False),
        ("unix:/run/auth.sock", False),
    ],
)
def test_an_auth_service_open_to_others_is_a_warning(address: str, warned: bool) -> None:
    environ = {"MESH_AUTH_LISTEN": address, "MESH_INBOUND_MODE": "nginx"}
    warnings = _load(environ).warnings
    assert bool(warnings) is warned
    assert all(f'MESH_AUTH_LISTEN is "{address}": the auth service' in one for one in warnings)
    assert _load({**environ, "MESH_INBOUND_MODE": "embedded"}).warnings == ()


def test_the_rust_meshs_file_as_its_start_script_writes_it(tmp_path: Path) -> None:
    file = _file(
        tmp_path,
        """
        [client]
        enabled = true
        address = "0.0.0.0"
        port = 8091
        [auth]
        enabled = true
        address = "127.0.0.1"
        port = 8092
        [dstack]
        gateway_domain = ""
        [tls]
        cert_file = "c"
        key_file = "k"
        ca_file = "a"
        """,
    )
    loaded = _load({"DSTACK_MESH_BACKEND": ""}, file=file, present=(*AGENT_PATHS, *"cka"))
    settings = loaded.settings
    assert settings.outbound.listen == TcpAddress("0.0.0.0", 8091)
    assert (settings.inbound.mode, settings.inbound.backend) == ("nginx", None)
    assert settings.inbound.auth_listen == TcpAddress("127.0.0.1", 8092)
    assert settings.dstack.gateway_domain is None
    assert (settings.tls.cert_file, settings.tls.ca_file) == ("c", "a")
    assert str(loaded.sources["inbound.mode"]) == f"file {file}"
    assert loaded.warnings == ()


def test_the_agent_is_the_first_socket_that_exists() -> None:
    loaded = _load(present=AGENT_PATHS[2:])
    assert loaded.settings.dstack.agent == UnixAddress(AGENT_PATHS[2])
    assert str(loaded.sources["dstack.agent"]) == "default"


def test_without_an_agent_the_first_path_stays_and_that_is_said() -> None:
    loaded = _load(present=())
    assert loaded.settings.dstack.agent == UnixAddress(AGENT_PATHS[0])
    assert len(loaded.warnings) == 1
    assert AGENT_PATHS[3] in loaded.warnings[0]
    given = _load({"DSTACK_AGENT_ADDRESS": "unix:/nowhere"}, present=())
    assert given.warnings == ()


def test_value_of_reads_the_tree() -> None:
    settings = _load().settings
    assert value_of(settings, "tls.min_version") == "1.3"
    assert value_of(settings, "max_connections") == 10000
