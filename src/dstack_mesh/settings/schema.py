"""The one table of settings, from which flags, environment, file, `config`, help and docs are made.

A row's key is its place in the TOML file and in the tree (`outbound.listen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstack_mesh.gateway_domain import parse_gateway
from dstack_mesh.policy.allow import Allow
from dstack_mesh.settings import parse

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value: how it is read from text, shown as text, and what it takes, in words."""

    read: Callable[[str], Any]
    accepts: str
    show: Callable[[Any], str] = str
    number: bool = False
    """Written as a number in TOML and JSON, and accepted as one."""

    timed: bool = False
    """A number in the file is taken as seconds."""

    many: bool = False
    """The file may give a list of strings instead of one with commas."""

    words: tuple[str, ...] = ()
    """All that is accepted, where that is a few words: for completion on the command line."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `env` holds its variables, the one that wins first."""

    key: str
    env: tuple[str, ...]
    kind: Kind
    default: str | None
    """The default as text that `kind` reads; None is unset."""

    help: str
    when_unset: str = "none"
    """What no value means, in words for the reader."""

    reloadable: bool = False
    """Re-read on SIGHUP."""

    off_text: str | None = None
    """What a value of None is written as, where None is a value of its own (`off`)."""

    restricts: bool = False
    """Says who may do what: an empty variable is an error here, and not the wish for the default.

    Elsewhere it counts as not set, since compose files hand in `MESH_GATEWAY=` for what is not
    filled in. Where the default is to let everybody, that would open what was to be closed.
    """

    @property
    def flag(self) -> str:
        """The command line's flag: the variable's name without its prefix."""
        name = self.env[0].removeprefix("MESH_").removeprefix("DSTACK_")
        return "--" + name.lower().replace("_", "-")

    def text(self, value: Any) -> str | None:
        """Write `value` so that it is read back the same; None where it is unset."""
        return self.off_text if value is None else self.kind.show(value)


def _choice(*words: str) -> Kind:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Kind(read, ", ".join(words[:-1]) + f" or {words[-1]}", words=words)


_LISTEN = Kind(
    parse.listen, "host:port, [ipv6]:port (port 0: any free one), unix:/absolute/path or off"
)
_DURATION = Kind(
    parse.duration, "a time over 0 such as 250ms, 30s, 5m, 24h or plain seconds",
    parse.show_duration, timed=True,
)  # fmt: skip
_PATH = Kind(parse.path, "a file's path")

AGENT_PATHS = (
    "/var/run/dstack/dstack.sock",
    "/run/dstack/dstack.sock",
    "/var/run/dstack.sock",
    "/run/dstack.sock",
)
"""Where the guest agent's socket is looked for when nothing names it."""

SCHEMA: tuple[Setting, ...] = (
    Setting(
        "outbound.listen", ("MESH_OUTBOUND_LISTEN",), _LISTEN, "127.0.0.1:8091",
        "Where the local application's plain HTTP is taken; off disables.", off_text="off",
    ),
    Setting(
        "outbound.default_port", ("MESH_DEFAULT_PORT",),
        Kind(parse.port, "a port from 1 to 65535", number=True), "443",
        "The target's port when no header names one.",
    ),
    Setting(
        "outbound.agent", ("MESH_AGENT_EXPOSE",), _choice("all", "info", "none"), "all",
        "What of the guest agent the outbound listener offers.", restricts=True,
    ),
    Setting(
        "outbound.connect_timeout", ("MESH_CONNECT_TIMEOUT",), _DURATION, "10s",
        "The time for name, TCP and TLS together.",
    ),
    Setting(
        "outbound.response_timeout", ("MESH_RESPONSE_TIMEOUT",),
        Kind(
            parse.duration_or_none,
            "a time such as 250ms, 30s, 5m, 24h or plain seconds; 0 is none",
            parse.show_duration, timed=True,
        ),
        "60s", "From the request's end to the response's first byte; 0 is none.",
    ),
    Setting(
        "inbound.backend", ("MESH_BACKEND", "DSTACK_MESH_BACKEND"),
        Kind(parse.backend, "host:port, http://host:port or unix:/absolute/path"), None,
        "Where verified callers' requests go.", when_unset="none: inbound is off",
    ),
    Setting(
        "inbound.mode", ("MESH_INBOUND_MODE",), _choice("embedded", "nginx", "off"), "embedded",
        "Who terminates the callers' TLS: the mesh itself, or nginx, which asks the auth service.",
    ),
    Setting(
        "inbound.listen", ("MESH_INBOUND_LISTEN",), _LISTEN, "0.0.0.0:8443",
        "Where other CVMs' mTLS is taken, by nginx in nginx mode; off disables.", off_text="off",
    ),
    Setting(
        "inbound.auth_listen", ("MESH_AUTH_LISTEN",),
        Kind(
            parse.listen_on, "host:port, [ipv6]:port (port 0: any free one) or unix:/absolute/path"
        ),
        "127.0.0.1:8092",
        "nginx mode: where the auth service listens. Nothing but nginx may reach it.",
    ),
    Setting(
        "inbound.server_name", ("MESH_SERVER_NAME", "DSTACK_MESH_SERVER_NAME"),
        Kind(
            parse.server_name,
            "host names, *.example.com among them, with a space between, or _ for any",
        ),
        "_", "nginx mode: the `server_name` in the configuration that nginx-config prints.",
    ),
    Setting(
        "inbound.allow", ("MESH_ALLOWED_APPS",),
        Kind(
            Allow.parse, "any, self, or app-ids of 40 hex digits, comma separated",
            lambda value: str(value.text), many=True,
        ),
        "any", "Which apps under this KMS may call.", reloadable=True, restricts=True,
    ),
    Setting(
        "inbound.policy_mode", ("MESH_POLICY_MODE",), _choice("enforce", "audit"), "enforce",
        "Whether policy denies, or only counts and logs what it would deny (audit).",
        reloadable=True,
    ),
    Setting(
        "admin.listen", ("MESH_ADMIN_LISTEN",), _LISTEN, "127.0.0.1:8093",
        "Where health and metrics are served; off disables.", off_text="off",
    ),
    Setting(
        "admin.label_apps", ("MESH_LABEL_APPS",),
        Kind(
            parse.app_ids, "app-ids of 40 hex digits, comma separated", parse.show_app_ids,
            many=True,
        ),
        None, "Apps whose requests have metrics of their own; the others are counted as one.",
        when_unset="none",
    ),
    Setting(
        "dstack.gateway_domain", ("MESH_GATEWAY", "DSTACK_GATEWAY_DOMAIN"),
        Kind(parse_gateway, "base.domain[:port] or fixed/host:port", lambda value: str(value.text)),
        None, "The gateway's domain, or one fixed address for everything.",
        when_unset="discovered",
    ),
    Setting(
        "dstack.agent", ("DSTACK_AGENT_ADDRESS",),
        Kind(parse.http_base, "unix:/absolute/path or http://host:port", parse.show_base),
        f"unix:{AGENT_PATHS[0]}",
        "The guest agent; by default the first that exists of " + ", ".join(AGENT_PATHS) + ".",
    ),
    Setting(
        "dstack.sys_config", ("MESH_SYS_CONFIG",), _PATH, "/dstack/.host-shared/.sys-config.json",
        "The file in which the gateways' URLs are read.",
    ),
    Setting(
        "dstack.gateway_connect", ("MESH_GATEWAY_CONNECT",), Kind(parse.tcp, "host:port"), None,
        "The address to connect to instead of resolving the server name, which is still sent.",
    ),
    Setting(
        "tls.cert_file", ("MESH_CERT_FILE",), _PATH, None,
        "The identity's certificate chain (PEM); with key_file and ca_file, or not at all.",
        when_unset="none: the guest agent issues", reloadable=True,
    ),
    Setting(
        "tls.key_file", ("MESH_KEY_FILE",), _PATH, None,
        "The identity's private key (PEM).", when_unset="none: the guest agent issues",
        reloadable=True,
    ),
    Setting(
        "tls.ca_file", ("MESH_CA_FILE",), _PATH, None,
        "The KMS root that the mesh trusts (PEM).", when_unset="none: the guest agent issues",
        reloadable=True,
    ),
    Setting(
        "tls.lifetime", ("MESH_CERT_LIFETIME",), _DURATION, "24h",
        "The lifetime asked of the guest agent; renewed at 2/3 of it.",
    ),
    Setting(
        "tls.min_version", ("MESH_TLS_MIN_VERSION",), _choice("1.2", "1.3"), "1.3",
        "The oldest TLS version; 1.2 for peers that have no better.",
    ),
    Setting(
        "log.format", ("MESH_LOG_FORMAT",), _choice("json", "text"), "json",
        "How log events are written.", reloadable=True,
    ),
    Setting(
        "log.level", ("MESH_LOG_LEVEL",), _choice("debug", "info", "warning", "error"), "info",
        "The least severe events that are logged.", reloadable=True,
    ),
    Setting(
        "log.access", ("MESH_ACCESS_LOG",), _choice("off", "errors", "all"), "off",
        "The access log: one event for each exchange, for those that failed, or none.",
        reloadable=True,
    ),
    Setting(
        "workers", ("MESH_WORKERS",),
        Kind(parse.workers, "a whole number from 1 to 64", number=True), "1",
        "Worker processes that share the listeners.",
    ),
    Setting(
        "drain_timeout", ("MESH_DRAIN_TIMEOUT",), _DURATION, "30s",
        "How long an ending process finishes what is in flight.",
    ),
    Setting(
        "idle_timeout", ("MESH_IDLE_TIMEOUT",), _DURATION, "5m",
        "How long a connection may stay with no exchange on it.",
    ),
    Setting(
        "head_timeout", ("MESH_HEAD_TIMEOUT",), _DURATION, "15s",
        "The time to receive a request's head.",
    ),
    Setting(
        "max_connections", ("MESH_MAX_CONNECTIONS",),
        Kind(parse.count, "a whole number from 1 to 999999999", number=True), "10000",
        "Connections per listener; over it idle ones give way, or callers get overloaded.",
    ),
)  # fmt: skip

BY_KEY = {setting.key: setting for setting in SCHEMA}
BY_ENV = {name: setting for setting in SCHEMA for name in setting.env}
