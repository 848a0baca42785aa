"""The settings file: TOML to text per key, our own keys and the Rust mesh's own file alike."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, Any, NamedTuple

from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.errors import SettingsError, one_line, shown
from dstack_mesh.settings.rules import TABLES
from dstack_mesh.settings.schema import BY_KEY, Setting

if TYPE_CHECKING:
    from pathlib import Path

_SECTIONS = {key.partition(".")[0] for key in BY_KEY if "." in key}
_RUST_LISTENER: dict[str, type] = {"enabled": bool, "address": str, "port": int}
"""Both `[client]` and `[auth]` of the Rust mesh's file have these keys."""

_RUST_CLIENT_DEFAULT = TcpAddress("127.0.0.1", 8091)
_RUST_AUTH_DEFAULT = TcpAddress("127.0.0.1", 8092)
_RUST_KEYS = ("dstack.gateway_domain", "tls.cert_file", "tls.key_file", "tls.ca_file")
"""Keys that the Rust mesh's file has too; what is not known is an empty string there."""


class InFile(NamedTuple):
    """What a file sets."""

    values: dict[str, str]
    """The text of each key."""

    tables: dict[str, object]
    """What stands at each key of `rules.TABLES` that is there."""


def read(file: Path) -> InFile:
    """Read `file` to the text of each key that it sets, and its tables of rules and routes.

    Raises SettingsError where it cannot be read, is not TOML, or has a key that is unknown or of
    the wrong type. The values themselves are not judged here.
    """
    name = one_line(str(file))
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name}: is not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name}: is not valid TOML: {one_line(str(error))}") from error

    tables = _tables(document)
    client = _rust_listener("client", document.pop("client", None), name)
    auth = _rust_listener("auth", document.pop("auth", None), name)
    values = {key: _text(key, value, name) for key, value in _flat(document, name)}
    if client is not None:
        _add(values, "client", name, {"outbound.listen": _address(client, _RUST_CLIENT_DEFAULT)})
    if auth is not None and auth.get("enabled", True):
        listen = _address(auth, _RUST_AUTH_DEFAULT)
        _add(values, "auth", name, {"inbound.mode": "nginx", "inbound.auth_listen": listen})
    for key in _RUST_KEYS:
        if values.get(key) == "":
            del values[key]
    return InFile(values, tables)


def nearest(name: str, known: list[str]) -> str:
    """Give the one of `known` that `name` was most likely meant to be."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def _tables(document: dict[str, Any]) -> dict[str, object]:
    inbound = document.get("inbound")
    if not isinstance(inbound, dict):
        return {}
    names = [key.partition(".")[2] for key in TABLES]
    return {f"inbound.{name}": inbound.pop(name) for name in names if name in inbound}


def _flat(document: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise SettingsError(f"{key} in {name} is {shown(value)}: accepted is a table")
            found += [(f"{key}.{inner}", setting) for inner, setting in value.items()]
        else:
            found.append((key, value))
    for key, value in found:
        if key not in BY_KEY:
            raise SettingsError(
                f"{one_line(key)} in {name} is {shown(value)}: no such key; the nearest known is"
                f" {nearest(key, [*BY_KEY, *TABLES])}"
            )
    return found


def _text(key: str, value: object, name: str) -> str:
    setting = BY_KEY[key]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if setting.kind.number or setting.kind.timed:
            return repr(value)
    elif setting.kind.many and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    raise SettingsError(f"{key} in {name} is {shown(value)}: accepted is {_accepted(setting)}")


def _accepted(setting: Setting) -> str:
    kind = setting.kind
    if kind.number:
        return kind.accepts
    form = "a list of strings or a string" if kind.many else "a string"
    return f"{form}: {kind.accepts}"


def _rust_listener(section: str, table: object, name: str) -> dict[str, Any] | None:
    if table is None:
        return None
    if not isinstance(table, dict):
        raise SettingsError(f"{section} in {name} is {shown(table)}: accepted is a table")
    for key, value in table.items():
        wanted = _RUST_LISTENER.get(key)
        if wanted is None:
            raise SettingsError(
                f"{section}.{one_line(key)} in {name} is {shown(value)}: no such key; accepted are"
                f" {', '.join(_RUST_LISTENER)}"
            )
        if type(value) is not wanted:
            words = {bool: "true or false", str: "a string", int: "a whole number"}[wanted]
            raise SettingsError(f"{section}.{key} in {name} is {shown(value)}: accepted is {words}")
    return table


def _address(table: dict[str, Any], default: TcpAddress) -> str:
    if not table.get("enabled", True):
        return "off"
    host = table.get("address") or default.host
    return str(TcpAddress(host, table.get("port", default.port)))


def _add(values: dict[str, str], section: str, name: str, more: dict[str, str]) -> None:
    """Add what a section of the Rust mesh's file means, unless our own keys say it too."""
    for key in more.keys() & values.keys():
        raise SettingsError(
            f"{key} in {name} is {shown(values[key])} and [{section}] is there too: accepted is"
            " one of the two"
        )
    values.update(more)
