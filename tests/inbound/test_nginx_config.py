"""The printed configuration, read by a small parser of nginx's syntax: what is set, and where."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh import errors
from dstack_mesh.identity.tls import _TLS12_CIPHERS
from dstack_mesh.inbound.nginx_config import (
    DEFAULT_FILES,
    NginxOptions,
    http_part,
    nginx_options,
    whole_file,
)
from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import load_settings
from dstack_mesh.settings.tree import Settings

Directive = tuple[list[str], list[Any]]
"""Its words, and what is in its braces."""

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}


def parse(text: str) -> list[Directive]:
    """Parse as nginx does (`ngx_conf_read_token`)."""
    stack: list[list[Directive]] = [[]]
    words: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char in " \t\r\n":
            at += 1
        elif char == "#":
            at = text.index("\n", at)
        elif char in ";{":
            assert words, f"nothing before {char!r} at {text[:at]!r}"
            stack[-1].append((words, []))
            if char == "{":
                stack.append(stack[-1][-1][1])
            words = []
            at += 1
        elif char == "}":
            assert not words, words
            stack.pop()
            at += 1
        else:
            word, at = _word(text, at)
            words.append(word)
    assert len(stack) == 1
    assert not words
    return stack[0]


def _word(text: str, at: int) -> tuple[str, int]:
    quote = text[at] if text[at] in "\"'" else ""
    at += bool(quote)
    word = ""
    while True:
        char = text[at]
        if char == "\\" and text[at + 1] in ESCAPES:
            word += ESCAPES[text[at + 1]]
            at += 2
            continue
        if quote and char == quote:
            assert text[at + 1] in " \t\r\n;{)", "something stands behind a quote"
            return word, at + 1
        if not quote and char in " \t\r\n;{" and not (char == "{" and word.endswith("$")):
            return word, at
        word += char
        at += 1


def words(block: list[Directive], *path: str) -> list[list[str]]:
    """Give the arguments of each directive of this name, below these blocks."""
    for name in path[:-1]:
        block = [inner for found, body in block if found[0] == name for inner in body]
    return [found[1:] for found, _ in block if found[0] == path[-1]]


def one(block: list[Directive], *path: str) -> list[str]:
    (found,) = words(block, *path)
    return found


def location(block: list[Directive], name: str) -> list[Directive]:
    server = [inner for found, body in block if found[0] == "server" for inner in body]
    found: list[Directive]
    (found,) = [body for said, body in server if said[0] == "location" and said[-1] == name]
    return found


ENVIRON = {
    "MESH_BACKEND": "app:8080",
    "DSTACK_AGENT_ADDRESS": "unix:/a",
    "MESH_INBOUND_MODE": "nginx",
}


def settings(**environ: str) -> Settings:
    return load_settings({}, {**ENVIRON, **environ}, None).settings


def printed(**environ: str) -> list[Directive]:
    return parse(http_part(nginx_options(settings(**environ))))


def test_the_values_of_the_settings_are_where_they_belong() -> None:
    block = printed(
        MESH_INBOUND_LISTEN="10.0.0.1:443",
        MESH_AUTH_LISTEN="unix:/run/mesh/auth.sock",
        DSTACK_MESH_SERVER_NAME="a.example *.b.example",
        MESH_HEAD_TIMEOUT="3s",
        MESH_IDLE_TIMEOUT="250ms",
        MESH_CONNECT_TIMEOUT="1.5s",
        MESH_RESPONSE_TIMEOUT="20m",
    )
    assert one(block, "server", "listen")[:2] == ["10.0.0.1:443", "ssl"]
    assert one(block, "server", "server_name") == ["a.example", "*.b.example"]
    assert words(block, "upstream", "server") == [
        ["app:8080", "max_fails=0"],
        ["unix:/run/mesh/auth.sock", "max_fails=0"],
    ]
    assert one(block, "server", "client_header_timeout") == ["3000ms"]
    assert one(block, "server", "keepalive_timeout") == ["250ms"]
    assert one(block, "upstream", "keepalive_timeout") == ["200ms"]
    proxy = location(block, "/")
    assert one(proxy, "proxy_connect_timeout") == ["1500ms"]
    assert one(proxy, "proxy_read_timeout") == ["1200000ms"]


@pytest.mark.parametrize("timeout", ["0", "60s"])
def test_streams_may_be_silent_as_long_as_the_gateway_lets_them(timeout: str) -> None:
    proxy = location(printed(MESH_RESPONSE_TIMEOUT=timeout), "/")
    assert one(proxy, "proxy_read_timeout") == one(proxy, "proxy_send_timeout") == ["600000ms"]


def test_tls_is_as_the_terminators() -> None:
    block = printed()
    assert one(block, "server", "ssl_protocols") == ["TLSv1.3"]
    assert one(block, "server", "ssl_ciphers") == [_TLS12_CIPHERS]
    assert one(block, "server", "ssl_verify_client") == ["optional"]
    assert one(block, "server", "ssl_session_cache") == ["off"]
    assert one(block, "server", "ssl_session_tickets") == ["off"]
    older = printed(MESH_TLS_MIN_VERSION="1.2")
    assert one(older, "server", "ssl_protocols") == ["TLSv1.2", "TLSv1.3"]


def test_the_identity_is_read_from_the_settings_files(tmp_path: Path) -> None:
    for name in ("c", "k", "a"):
        (tmp_path / name).touch()
    block = printed(
        MESH_CERT_FILE=str(tmp_path / "c"),
        MESH_KEY_FILE=str(tmp_path / "k"),
        MESH_CA_FILE=str(tmp_path / "a"),
    )
    assert one(block, "server", "ssl_certificate") == [str(tmp_path / "c")]
    assert one(block, "server", "ssl_certificate_key") == [str(tmp_path / "k")]
    assert one(block, "server", "ssl_client_certificate") == [str(tmp_path / "a")]


def test_without_files_the_places_are_the_same_each_time() -> None:
    block = printed()
    assert one(block, "server", "ssl_certificate_key") == [DEFAULT_FILES["tls.key_file"]]


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c", "engine:x", "data:y"):
        (tmp_path / name).touch()
    block = printed(MESH_CERT_FILE="c", MESH_KEY_FILE="engine:x", MESH_CA_FILE="data:y")
    assert one(block, "server", "ssl_certificate") == [f"{tmp_path}/c"]
    assert one(block, "server", "ssl_certificate_key") == [f"{tmp_path}/engine:x"]


def test_the_auth_service_is_asked_with_what_it_reads_and_nothing_of_the_callers() -> None:
    ask = location(printed(), "/.dstack-mesh/auth")
    assert ["internal"] in [found for found, _ in ask]
    assert one(ask, "proxy_pass") == ["http://dstack_mesh_auth/auth"]
    assert one(ask, "proxy_pass_request_headers") == ["off"]
    assert one(ask, "proxy_pass_request_body") == ["off"]
    sent = dict(words(ask, "proxy_set_header"))
    assert sent["x-client-cert"] == "$ssl_client_escaped_cert"
    assert sent["x-client-verify"] == "$ssl_client_verify"
    assert sent["x-original-method"] == "$request_method"
    assert sent["x-original-uri"] == "$request_uri"
    assert sent["Content-Length"] == sent["Connection"] == ""


def test_what_the_backend_gets() -> None:
    proxy = location(printed(), "/")
    sent = dict(words(proxy, "proxy_set_header"))
    assert sent == {
        "Host": "$dstack_mesh_host",
        "Upgrade": "$dstack_mesh_upgrade",
        "Connection": "$dstack_mesh_connection",
        "x-dstack-app-id": "$dstack_mesh_app_id",
        "x-forwarded-for": "$proxy_add_x_forwarded_for",
        "x-forwarded-proto": "https",
        "x-real-ip": "$remote_addr",
        "x-client-cert": "",
        "x-client-verify": "",
    }
    assert one(proxy, "auth_request") == ["/.dstack-mesh/auth"]
    assert one(proxy, "proxy_hide_header") == ["x-dstack-mesh-error"]
    assert one(proxy, "proxy_request_buffering") == one(proxy, "proxy_buffering") == ["off"]


def test_every_error_that_nginx_makes_is_one_of_ours() -> None:
    block = printed()
    codes = {
        kind.code: (kind.status, kind.title)
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.MeshError) and hasattr(kind, "code")
    }
    answers = 0
    for found, body in [inner for said, server in block if said[0] == "server" for inner in server]:
        if found[0] != "location" or not words(body, "return"):
            continue
        status, text = one(body, "return")
        name, code, always = one(body, "add_header")
        assert (name, always) == ("x-dstack-mesh-error", "always")
        assert one(body, "default_type") == ["application/problem+json"]
        if code.startswith("$"):
            assert text == "$dstack_mesh_problem\n"
            continue
        answers += 1
        assert ["internal"] in [said for said, _ in body]
        fields = json.loads(text)
        assert (int(status), fields["title"]) == codes[code]
        assert (fields["status"], fields["code"]) == (int(status), code)
        assert fields["request_id"] == "$dstack_mesh_request_id"
        assert text.endswith("}\n")
    assert answers == 7
    targets = {said[-1] for said in words(block, "server", "error_page")}
    named = {said[-1] for said in words(block, "server", "location")}
    assert targets == named - {"/", "/.dstack-mesh/auth"}


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("0.0.0.0:8443", ["0.0.0.0:8443", "ssl", "so_keepalive=60s:15s:4"]),
        ("[::]:443", ["[::]:443", "ssl", "so_keepalive=60s:15s:4", "ipv6only=off"]),
        ("[::1]:443", ["[::1]:443", "ssl", "so_keepalive=60s:15s:4"]),
        ("unix:/run/tls.sock", ["unix:/run/tls.sock", "ssl"]),
    ],
)
def test_listening(listen: str, said: list[str]) -> None:
    assert one(printed(MESH_INBOUND_LISTEN=listen), "server", "listen") == said


@pytest.mark.parametrize(
    ("listen", "asked"),
    [
        ("127.0.0.1:8092", "127.0.0.1:8092"),
        ("0.0.0.0:8092", "127.0.0.1:8092"),
        ("[::]:8092", "[::1]:8092"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
    ],
)
def test_the_auth_service_is_asked_where_it_listens(listen: str, asked: str) -> None:
    assert words(printed(MESH_AUTH_LISTEN=listen), "upstream", "server")[1][0] == asked


@pytest.mark.parametrize(
    ("backend", "host"),
    [("app:8080", "app:8080"), ("[::1]:80", "[::1]:80"), ("unix:/run/b.sock", "localhost")],
)
def test_a_request_without_a_host_gets_the_backends(backend: str, host: str) -> None:
    block = printed(MESH_BACKEND=backend)
    (found,) = [body for said, body in block if said[-1] == "$dstack_mesh_host"]
    assert (["", host], []) in found


def test_a_whole_file_has_the_part_inside_http(tmp_path: Path) -> None:
    options = nginx_options(settings(), tmp_path / "with space")
    whole = parse(whole_file(options))
    assert [body for said, body in whole if said == ["events"]] == [
        [(["worker_connections", "4096"], [])]
    ]
    (http,) = [body for said, body in whole if said == ["http"]]
    part = parse(http_part(options))
    assert http[-len(part) :] == part
    assert one(whole, "pid") == [f"{tmp_path}/with space/nginx.pid"]
    assert one(http, "proxy_temp_path") == [f"{tmp_path}/with space/proxy"]
    bare = parse(whole_file(nginx_options(settings())))
    assert words(bare, "pid") == words(bare, "http", "client_body_temp_path") == []


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"MESH_BACKEND": ""}, "inbound.backend (MESH_BACKEND) is not set: nginx needs a backend"),
        ({"MESH_INBOUND_LISTEN": "off"}, 'inbound.listen (MESH_INBOUND_LISTEN) is "off"'),
        ({"MESH_INBOUND_LISTEN": "127.0.0.1:0"}, "accepted is one from 1 up"),
        ({"MESH_AUTH_LISTEN": "127.0.0.1:0"}, 'inbound.auth_listen (MESH_AUTH_LISTEN) is "127'),
        ({"MESH_AUTH_LISTEN": "unix:/a b"}, "nginx takes a path of letters"),
        ({"MESH_BACKEND": "unix:/a;include /x"}, "nginx takes a path of letters"),
        ({"MESH_BACKEND": "unix:/a${x}"}, 'inbound.backend (MESH_BACKEND) is "unix:/a${x}"'),
    ],
)
def test_what_cannot_be_written_is_an_error(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        nginx_options(settings(**environ))
    assert said in str(caught.value)


HOSTILE = st.text(
    st.sampled_from("ab/ .;{}$\"'\\#\n\r\t@é:~*`()=,-_\x00\x7f"), min_size=1, max_size=20
)
SHAPE = [len(said) for said, _ in printed()]


def _same_shape(options: NginxOptions) -> None:
    found = parse(whole_file(options))
    (http,) = [body for said, body in found if said == ["http"]]
    assert [len(said) for said, _ in http[-len(SHAPE) :]] == SHAPE
    assert [said[0] for said, _ in found] == [
        *("worker_processes", "error_log", "pid", "events", "http")
    ]


@given(text=HOSTILE)
def test_no_path_can_be_more_than_one_argument(text: str) -> None:
    """Whatever a path is, it is refused, or is read back as it was in the place it was put."""
    base = settings()
    tls = replace(base.tls, cert_file="/" + text, key_file="/k", ca_file="/c")
    for changed, state in ((replace(base, tls=tls), Path("/s")), (base, Path("/s" + text))):
        try:
            options = nginx_options(changed, state)
        except SettingsError:
            assert any(char in text for char in "$\"'\\\n\r\t\x00\x7f"), text
        else:
            _same_shape(options)
            block = parse(http_part(options))
            assert one(block, "server", "ssl_certificate") == [options.cert_file]


@given(text=HOSTILE)
def test_no_unix_socket_can_be_more_than_one_argument(text: str) -> None:
    base = settings()
    address = UnixAddress("/" + text)
    for inbound in (
        replace(base.inbound, backend=address),
        replace(base.inbound, listen=address),
        replace(base.inbound, auth_listen=address),
    ):
        try:
            options = nginx_options(replace(base, inbound=inbound), Path("/s"))
        except SettingsError:
            pass
        else:
            _same_shape(options)
            assert set(text) <= set("ab/.@~=,-_")


@given(text=HOSTILE)
def test_no_host_or_server_name_can_be_more_than_it_is(text: str) -> None:
    """Settings refuse what is no host name; what they take is written as it is."""
    for name in ("MESH_SERVER_NAME", "MESH_BACKEND"):
        value = text if name == "MESH_SERVER_NAME" else f"{text}:80"
        try:
            found = settings(**{name: value})
        except SettingsError:
            continue
        options = nginx_options(found, Path("/s"))
        if name == "MESH_SERVER_NAME":
            assert one(parse(http_part(options)), "server", "server_name") == text.split(" ")
        else:
            _same_shape(options)


def test_a_value_that_looks_like_a_placeholder_stays_as_it_is() -> None:
    options = replace(nginx_options(settings()), cert_file="/@KEY_FILE@", key_file="/key")
    block = parse(http_part(options))
    assert one(block, "server", "ssl_certificate") == ["/@KEY_FILE@"]


def test_addresses_are_written_as_nginx_reads_them() -> None:
    options = replace(nginx_options(settings()), backend=TcpAddress("::1", 80))
    assert words(parse(http_part(options)), "upstream", "server")[0][0] == "[::1]:80"
