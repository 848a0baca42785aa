"""The configuration of nginx that goes with nginx mode, written from the same settings.

It does what the embedded terminator does, as far as nginx can; docs/nginx.md has the limits. Its
values are written so that none of them can be read as more than one argument.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dstack_mesh.identity.tls import _TLS12_CIPHERS as CIPHERS
from dstack_mesh.inbound.nginx_template import BODY, FILE, IDENTITY_MAP, PROBLEM
from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.relay.dial import authority
from dstack_mesh.settings.errors import SettingsError, shown
from dstack_mesh.settings.schema import BY_KEY
from dstack_mesh.settings.tree import Settings

DEFAULT_FILES = {
    "tls.cert_file": "/run/dstack-mesh/nginx/cert.pem",
    "tls.key_file": "/run/dstack-mesh/nginx/key.pem",
    "tls.ca_file": "/run/dstack-mesh/nginx/ca.pem",
}
"""Where nginx finds its identity when no setting says so. Whoever runs nginx puts it there."""

_GATEWAY_IDLE = 600.0
"""Seconds: the gateway cuts a connection on which nothing has moved for longer."""

_AUTH_IDLE = 60.0
_PLACEHOLDER = re.compile(r"@([A-Z0-9_]+)@")

# What nginx takes for a part of a string's syntax. It has no way to write a literal `$`.
_WRITABLE = re.compile(r"[^\x00-\x1f\x7f$\"'\\]+").fullmatch
_BARE_PATH = re.compile(r"/[A-Za-z0-9._/@+,=~-]+").fullmatch

_NGINX_ERRORS = {
    "BAD_REQUEST": (400, "bad_request", "Bad request", "nginx does not take this request"),
    "UNTRUSTED": (
        *(401, "client_cert_untrusted", "Client certificate not trusted"),
        "nginx could not verify the client certificate up to this KMS's root",
    ),
    "URI_TOO_LONG": (
        *(414, "uri_too_long", "Request target too long"),
        "the request target is longer than nginx takes",
    ),
    "HEADER_TOO_LARGE": (
        *(431, "header_too_large", "Request header too large"),
        "the request's head is larger than nginx takes",
    ),
    "NO_AUTH": (
        *(503, "identity_unavailable", "No identity"),
        "the auth service of the mesh does not answer nginx",
    ),
    "NO_BACKEND": (502, "connect_failed", "Connection failed", "the backend does not answer nginx"),
    "BACKEND_SLOW": (
        *(504, "response_timeout", "Response timed out"),
        "the backend did not answer nginx in time",
    ),
}


@dataclass(frozen=True, slots=True)
class NginxOptions:
    """Every value that comes from settings, as nginx is to read it. Times in seconds."""

    listen: Address
    server_name: str
    backend: Address
    auth: Address
    cert_file: str
    key_file: str
    ca_file: str
    min_version: str
    head_timeout: float
    idle_timeout: float
    connect_timeout: float
    response_timeout: float
    state_dir: str | None = None
    """Where nginx keeps its pid file and directories; None is where it was built to."""

    identity_link: str | None = None
    """A link to the directory of `cert.pem` and `key.pem`, instead of the two files.

    nginx then reads them anew for each handshake, so that a new identity needs no reload.
    """

    backend_servers: tuple[Address, ...] = ()
    """Where `backend` is right now, instead of having nginx resolve its name when it starts."""


def nginx_options(settings: Settings, state_dir: Path | None = None) -> NginxOptions:
    """Take from `settings` what nginx needs. Raises SettingsError where it cannot be written."""
    inbound, tls = settings.inbound, settings.tls
    backend = inbound.backend
    if backend is None:
        raise _error("inbound.backend", None, "nginx needs a backend to pass requests to")
    if inbound.listen is None:
        raise _error("inbound.listen", "off", "nginx needs an address to listen on")
    return NginxOptions(
        listen=_usable("inbound.listen", inbound.listen),
        server_name=inbound.server_name,
        backend=_usable("inbound.backend", backend),
        auth=_reachable(_usable("inbound.auth_listen", inbound.auth_listen)),
        cert_file=_file("tls.cert_file", tls.cert_file),
        key_file=_file("tls.key_file", tls.key_file),
        ca_file=_file("tls.ca_file", tls.ca_file),
        min_version=tls.min_version,
        head_timeout=settings.head_timeout,
        idle_timeout=settings.idle_timeout,
        connect_timeout=settings.outbound.connect_timeout,
        response_timeout=settings.outbound.response_timeout,
        state_dir=_path("--state-dir", str(state_dir.absolute())) if state_dir else None,
    )


def http_part(options: NginxOptions) -> str:
    """Write what belongs inside `http { }`: the server block, with its upstreams and maps."""
    idle = options.idle_timeout
    stream = max(options.response_timeout, _GATEWAY_IDLE)
    link = options.identity_link
    servers = options.backend_servers or (options.backend,)
    values = {
        "LISTEN": _listen(options.listen),
        "SERVER_NAME": options.server_name,
        "IDENTITY_MAP": IDENTITY_MAP if link else "",
        "IDENTITY_ROOT": f'    root "{link}";\n' if link else "",
        "BACKENDS": "".join(f"    server {one} max_fails=0;\n" for one in servers),
        "BACKEND_HOST": authority(options.backend).decode("ascii"),
        "AUTH": str(options.auth),
        "AUTH_IDLE": _seconds(min(_AUTH_IDLE, 0.8 * idle)),
        "CERT_FILE": "$dstack_mesh_identity/cert.pem" if link else options.cert_file,
        "KEY_FILE": "$dstack_mesh_identity/key.pem" if link else options.key_file,
        "CA_FILE": options.ca_file,
        "PROTOCOLS": "TLSv1.3" if options.min_version == "1.3" else "TLSv1.2 TLSv1.3",
        "CIPHERS": CIPHERS,
        "HEAD_TIMEOUT": _seconds(options.head_timeout),
        "IDLE_TIMEOUT": _seconds(idle),
        "CONNECT_TIMEOUT": _seconds(options.connect_timeout),
        "STREAM_TIMEOUT": _seconds(stream),
        **{f"RETURN_{name}": _problem(*error) for name, error in _NGINX_ERRORS.items()},
    }
    return _filled(BODY, values)


def whole_file(options: NginxOptions) -> str:
    """Write a complete `nginx.conf`."""
    state = options.state_dir
    kept_in = [f'pid "{state}/nginx.pid";\n'] if state else []
    temporary = [
        f'    {name}_temp_path "{state}/{name}";\n'
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        if state
    ]
    part = "".join(
        f"    {line}" if line.strip() else line
        for line in http_part(options).splitlines(keepends=True)
    )
    values = {"PID": "".join(kept_in), "TEMPORARY": "".join(temporary), "HTTP_PART": part}
    return _filled(FILE, values)


def _filled(template: str, values: dict[str, str]) -> str:
    """Put the values into the template, in one go: what a value looks like does not matter."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _listen(address: Address) -> str:
    if isinstance(address, UnixAddress):
        return f"{address} ssl"
    both = " ipv6only=off" if address.host == "::" else ""
    return f"{address} ssl so_keepalive=60s:15s:4{both}"


def _seconds(seconds: float) -> str:
    """Write a time in nginx's units; it has no fractions."""
    return f"{max(1, round(seconds * 1000))}ms"


def _problem(status: int, code: str, title: str, detail: str) -> str:
    body = {
        "type": "about:blank",
        "status": status,
        "title": title,
        "detail": detail,
        "code": code,
        "request_id": "REQUEST_ID",
    }
    # A single-quoted string: JSON's own quotes need no escape in it.
    text = msgspec.json.encode(body).decode().replace("'", "\\u0027")
    text = text.replace("REQUEST_ID", "$dstack_mesh_request_id")
    return _filled(PROBLEM, {"CODE": code, "STATUS": str(status), "BODY": text})


def _usable(key: str, address: Address) -> Address:
    if isinstance(address, UnixAddress) and not _BARE_PATH(address.path):
        raise _error(key, str(address), "nginx takes a path of letters, digits and ._/@+,=~- only")
    if isinstance(address, TcpAddress) and address.port == 0:
        raise _error(key, str(address), "nginx has to know the port; accepted is one from 1 up")
    return address


def _reachable(address: Address) -> Address:
    """Give the address at which a listener on any address is asked."""
    if isinstance(address, TcpAddress):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
        return TcpAddress(host, address.port)
    return address


def _file(key: str, value: str | None) -> str:
    # nginx resolves a relative path by its own prefix, and some with a colon in a way of its own.
    return _path(key, str(Path(value or DEFAULT_FILES[key]).absolute()))


def _path(key: str, path: str) -> str:
    if not _WRITABLE(path):
        raise _error(key, path, "nginx takes a path without $, quotes, \\ and control bytes only")
    return path


def _error(key: str, value: str | None, accepted: str) -> SettingsError:
    name = f"{key} ({BY_KEY[key].env[0]})" if key in BY_KEY else key
    return SettingsError(f"{name} is {'not set' if value is None else shown(value)}: {accepted}")
