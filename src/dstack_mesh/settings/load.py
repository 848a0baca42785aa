"""Flags beat environment beats file beats default: the merge, and the checks across keys."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dstack_mesh.model import TcpAddress
from dstack_mesh.settings import rules, toml_file, tree
from dstack_mesh.settings.errors import SettingsError, one_line, shown
from dstack_mesh.settings.schema import AGENT_PATHS, BY_ENV, BY_KEY, SCHEMA, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_SECTIONS: dict[str, Callable[..., Any]] = {
    "outbound": tree.OutboundSettings,
    "inbound": tree.InboundSettings,
    "admin": tree.AdminSettings,
    "dstack": tree.DstackSettings,
    "tls": tree.TlsSettings,
    "log": tree.LogSettings,
}
_TLS_FILES = ("tls.cert_file", "tls.key_file", "tls.ca_file")
_LISTENERS = ("outbound.listen", "inbound.listen", "inbound.auth_listen", "admin.listen")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from; as text `default`, `env NAME`, `file NAME` or `flag --NAME`."""

    kind: Literal["default", "env", "file", "flag"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind

    def key(self, setting: Setting) -> str:
        """Name the setting the way its writer did."""
        if self.kind == "file":
            return f"{setting.key} in {self.name}"
        return self.name or setting.key


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings in effect, the source of each key's value, and what its writer should know."""

    settings: tree.Settings
    sources: Mapping[str, Source]
    warnings: tuple[str, ...]
    again: Callable[[], Loaded] = field(compare=False, repr=False)
    """Read the same sources anew, for SIGHUP. Raises SettingsError."""


def load_settings(
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    file: Path | None,
    *,
    exists: Callable[[str], bool] = os.path.exists,
) -> Loaded:
    """Merge the sources into one tree. `flags` has the flags given, by key (`outbound.listen`).

    Every value given is judged, also one that another source overrides. An empty variable counts
    as not set, but where the setting restricts. Raises SettingsError for the first that is wrong.
    """
    in_file, tables = toml_file.read(file) if file is not None else ({}, {})
    file_name = one_line(str(file))
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for setting in SCHEMA:
        given: list[tuple[Source, str]] = []
        if setting.key in flags:
            given.append((Source("flag", setting.flag), flags[setting.key]))
        given += [
            (Source("env", name), environ[name])
            for name in setting.env
            if name in environ and (environ[name] or setting.restricts)
        ][:1]
        if setting.key in in_file:
            given.append((Source("file", file_name), in_file[setting.key]))
        read = [(_read(setting, source, text), source) for source, text in given]
        values[setting.key], sources[setting.key] = read[0] if read else _default(setting, exists)
    for key in rules.TABLES:
        values[key] = rules.read(key, tables[key], file_name) if key in tables else ()
        sources[key] = Source("file", file_name) if key in tables else Source("default")
    _check(values, sources, exists)
    _check_routes(values, sources)
    warnings = (
        _policy_is_off(values, sources)
        + _unknown_variables(environ)
        + _open_auth_service(values, sources)
    )
    if sources["dstack.agent"].kind == "default" and not exists(values["dstack.agent"].path):
        warnings.append(
            f"dstack.agent: no guest agent's socket is at {', '.join(AGENT_PATHS)};"
            f" {values['dstack.agent']} is asked until it answers"
        )
    return Loaded(
        _build(values),
        sources,
        tuple(warnings),
        again=lambda: load_settings(flags, environ, file, exists=exists),
    )


def value_of(settings: tree.Settings, key: str) -> Any:
    """Give the value of `key` (`outbound.listen`, or one of `rules.TABLES`) in the tree."""
    section, dot, name = key.partition(".")
    value = getattr(settings, section)
    return getattr(value, rules.FIELDS.get(key, name)) if dot else value


def _read(setting: Setting, source: Source, text: str) -> Any:
    try:
        return setting.kind.read(text)
    except ValueError as error:
        accepted = f"accepted is {setting.kind.accepts}"
        reason = one_line(str(error))
        if reason and "PRIVATE KEY" not in reason:
            accepted = reason if "accepted" in reason else f"{reason}; {accepted}"
        raise SettingsError(f"{source.key(setting)} is {shown(text)}: {accepted}") from error


def _default(setting: Setting, exists: Callable[[str], bool]) -> tuple[Any, Source]:
    text = setting.default
    if setting.key == "dstack.agent":
        found = (path for path in AGENT_PATHS if exists(path))
        text = f"unix:{next(found, AGENT_PATHS[0])}"
    return (None if text is None else setting.kind.read(text)), Source("default")


def _check(
    values: Mapping[str, Any], sources: Mapping[str, Source], exists: Callable[[str], bool]
) -> None:
    def key(name: str) -> str:
        return sources[name].key(BY_KEY[name])

    given = [name for name in _TLS_FILES if values[name] is not None]
    missing = [name for name in _TLS_FILES if values[name] is None]
    if given and missing:
        raise SettingsError(
            f"{key(given[0])} is {shown(values[given[0]])} without {' and '.join(missing)}:"
            f" accepted are all three of {', '.join(_TLS_FILES)}, or none"
        )
    for name in given:
        if not exists(values[name]):
            raise SettingsError(
                f"{key(name)} is {shown(values[name])}: there is no such file; accepted is"
                f" {BY_KEY[name].kind.accepts}"
            )

    mode = values["inbound.mode"]
    closed = set()  # in nginx mode nginx opens `inbound.listen`
    if mode != "embedded" or values["inbound.backend"] is None:
        closed.add("inbound.listen")
    if mode != "nginx":
        closed.add("inbound.auth_listen")
    taken: dict[Any, str] = {}
    for name in _LISTENERS:
        address = None if name in closed else values[name]
        if address is None or (isinstance(address, TcpAddress) and address.port == 0):
            continue
        if address in taken:
            raise SettingsError(
                f"{key(name)} is {shown(str(address))}, and so is {key(taken[address])}:"
                " accepted is an address of its own for each listener"
            )
        taken[address] = name


def _check_routes(values: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
    mode = values["inbound.mode"]
    if not values["inbound.route"] or mode == "off":
        return
    where = f"inbound.route in {sources['inbound.route'].name}"
    if mode == "nginx":
        raise SettingsError(
            f"{where} is there, and {sources['inbound.mode'].key(BY_KEY['inbound.mode'])} is"
            ' "nginx": accepted are routes in embedded mode only; behind nginx it is nginx that'
            " chooses the backend"
        )
    if values["inbound.backend"] is None:
        raise SettingsError(
            f"{where} is there without inbound.backend: accepted is both, since inbound.backend"
            " takes what no route does"
        )


def _policy_is_off(values: Mapping[str, Any], sources: Mapping[str, Source]) -> list[str]:
    """Warn where there is a policy, and nothing is denied by it."""
    name = "inbound.policy_mode"
    if values[name] != "audit":
        return []
    advice = (
        "policy denies nobody, not even who is not in inbound.allow (MESH_ALLOWED_APPS); what it"
        " would deny is counted and logged"
    )
    return [f'{sources[name].key(BY_KEY[name])} is "audit": {advice}']


def _open_auth_service(values: Mapping[str, Any], sources: Mapping[str, Source]) -> list[str]:
    """Warn of an auth service that others than nginx could ask."""
    name = "inbound.auth_listen"
    address = values[name]
    if values["inbound.mode"] != "nginx" or not isinstance(address, TcpAddress):
        return []
    try:
        if ipaddress.ip_address(address.host).is_loopback:
            return []
    except ValueError:
        if address.host == "localhost":
            return []
    found = f"{sources[name].key(BY_KEY[name])} is {shown(str(address))}"
    advice = "the auth service believes whoever asks to be nginx; use 127.0.0.1 or a unix socket"
    return [f"{found}: {advice}"]


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    unknown = sorted(name for name in environ if name.startswith("MESH_") and name not in BY_ENV)
    return [
        f"{one_line(name)} is not a setting; the nearest known is"
        f" {toml_file.nearest(name, list(BY_ENV))}"
        for name in unknown
    ]


def _build(values: Mapping[str, Any]) -> tree.Settings:
    whole: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            sections[section][rules.FIELDS.get(key, name)] = value
        else:
            whole[key] = value
    return tree.Settings(**whole, **{name: _SECTIONS[name](**sections[name]) for name in _SECTIONS})
