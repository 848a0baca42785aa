"""The file's `[[inbound.rule]]` and `[[inbound.route]]`: read, judged, and written again.

What is not understood is never passed over: a misspelt condition would be one that always fits.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.path import Pattern
from dstack_mesh.policy.route import Route, host_name
from dstack_mesh.policy.rule import INFO_CONDITIONS, Rule
from dstack_mesh.settings import parse
from dstack_mesh.settings.errors import SettingsError, one_line, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RULE, ROUTE = "inbound.rule", "inbound.route"
FIELDS = {RULE: "rules", ROUTE: "routes"}
"""Where the tables of each key are in `tree.InboundSettings`."""

TABLES = tuple(FIELDS)

ACTIONS = ("allow", "deny", "audit")
_LONGEST_NAME = 100
_method = re.compile(r"[!#$%&'*+.^_`|~0-9A-Z-]+").fullmatch  # a token, RFC 9110 5.6.2
_hex = re.compile(r"[0-9A-Fa-f]+").fullmatch
_DIGITS = {"compose_hash": 64, "os_image_hash": 64, "device_id": 64, "instance_id": 40}

ACCEPTED = {
    "name": "a printable string of 1 to 100 characters that no other rule has",
    "action": "allow, deny or audit",
    "apps": "a list of any, self and app-ids of 40 hex digits",
    "methods": "a list of methods in upper case, such as GET",
    "paths": "a list of paths, in which * is a segment or a part of one, and a final /** the"
    " folder and all below",
    **{name: f"a list of values of {digits} hex digits" for name, digits in _DIGITS.items()},
    "host": "a host name or address without a port",
    "path": "a path, in which * is a segment or a part of one, and a final /** the folder and all"
    " below",
    "backend": "host:port, http://host:port or unix:/absolute/path",
}
"""Every key of a rule or a route, and what it takes."""

RULE_KEYS = ("name", "action", "apps", "methods", "paths", *INFO_CONDITIONS)
ROUTE_KEYS = ("host", "path", "backend")


class _Table:
    """One table of the file, and how its errors begin."""

    def __init__(self, key: str, number: int, table: object, file: str) -> None:
        self.file = file
        self.where = f"{key} {number}"
        if not isinstance(table, dict):
            raise SettingsError(f"{self.where} in {file} is {shown(table)}: accepted is a table")
        self.table: dict[str, Any] = table
        name = table.get("name")
        if key == RULE and isinstance(name, str):
            self.where += f" {shown(name)}"

    def wrong(self, key: str, reason: str = "") -> SettingsError:
        """Make the error of the value of `key`."""
        said = f"{reason}; " if reason else ""
        return SettingsError(
            f"{self.where}: {key} in {self.file} is {shown(self.table[key])}: {one_line(said)}"
            f"accepted is {ACCEPTED[key]}"
        )

    def missing(self, what: str) -> SettingsError:
        """Make the error of a table without something."""
        return SettingsError(f"{self.where} in {self.file} has no {what}")

    def only(self, keys: tuple[str, ...]) -> None:
        """Refuse keys other than `keys`."""
        for key, value in self.table.items():
            if key not in keys:
                raise SettingsError(
                    f"{self.where}: {one_line(key)} in {self.file} is {shown(value)}: no such key;"
                    f" accepted are {', '.join(keys)}"
                )

    def text(self, key: str) -> str | None:
        """Give a string that is not empty, or None where it is not there."""
        value = self.table.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key)
        if not value:
            raise self.wrong(key, "it is empty")
        return value

    def texts(self, key: str, read: Callable[[str], str]) -> tuple[str, ...] | None:
        """Give a list that is not empty, each item as `read` reads it; one string is a list too."""
        value = self.table.get(key)
        if value is None:
            return None
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.wrong(key)
        if not items:
            raise self.wrong(key, "it is empty, and would fit nobody; leave the key out for all")
        try:
            return tuple(read(item) for item in items)
        except ValueError as error:
            raise self.wrong(key, str(error)) from error


def read(key: str, tables: object, file: str) -> tuple[Rule, ...] | tuple[Route, ...]:
    """Read what stands at `key`, one of `TABLES`, in `file` (its name). Raises SettingsError."""
    if not isinstance(tables, list) or not tables:
        raise SettingsError(f"{key} in {file} is {shown(tables)}: accepted are tables [[{key}]]")
    numbered = [_Table(key, number, table, file) for number, table in enumerate(tables, 1)]
    if key == ROUTE:
        return tuple(_route(table) for table in numbered)
    rules: list[Rule] = []
    for table in numbered:
        rule = _rule(table, f"rule {len(rules) + 1}")
        if any(other.name == rule.name for other in rules):
            raise SettingsError(
                f"{table.where}: name in {file} is {shown(rule.name)}, and so is another rule's:"
                f" accepted is {ACCEPTED['name']}"
            )
        rules.append(rule)
    return tuple(rules)


def _rule(table: _Table, default_name: str) -> Rule:
    table.only(RULE_KEYS)
    name = table.text("name") or default_name
    if len(name) > _LONGEST_NAME or not name.isprintable():
        raise table.wrong("name")
    action = table.text("action")
    if action is None:
        raise table.missing(f"action: accepted is {ACCEPTED['action']}")
    if action not in ACTIONS:
        raise table.wrong("action")
    apps = table.texts("apps", str)
    try:
        allow = Allow.parse(",".join(apps)) if apps is not None else None
    except ValueError as error:
        raise table.wrong("apps", str(error).partition(": accepted")[0]) from error
    return Rule(
        name=name,
        action=action,  # type: ignore[arg-type]  # one of ACTIONS
        apps=allow,
        methods=table.texts("methods", _read_method),
        paths=table.texts("paths", _read_path),
        **{key: table.texts(key, _reader(key)) for key in INFO_CONDITIONS},
    )


def _route(table: _Table) -> Route:
    table.only(ROUTE_KEYS)
    host, path, backend = (table.text(key) for key in ROUTE_KEYS)
    if backend is None:
        raise table.missing(f"backend: accepted is {ACCEPTED['backend']}")
    if host is None and path is None:
        raise table.missing("host and no path: accepted is one of them, or both")
    if host is not None:
        try:
            bare = f"[{host}]" if ":" in host and not host.startswith("[") else host
            parse.host(bare)
        except ValueError as error:
            raise table.wrong("host") from error
        host = host_name(bare.encode("ascii")).decode("ascii")
    if path is not None:
        try:
            Pattern(path)
        except ValueError as error:
            raise table.wrong("path", str(error)) from error
    try:
        return Route(parse.backend(backend), host, path)
    except ValueError as error:
        raise table.wrong("backend") from error


def _read_method(text: str) -> str:
    if _method(text) is None:
        raise ValueError(f"{shown(text)} is no method in upper case")
    return text


def _read_path(text: str) -> str:
    try:
        Pattern(text)
    except ValueError as error:
        raise ValueError(f"{shown(text)}: {error}") from error
    return text


def _reader(key: str) -> Callable[[str], str]:
    digits = _DIGITS[key]

    def read_hex(text: str) -> str:
        if _hex(text) is None or len(text) != digits:
            raise ValueError(f"{shown(text)} is not {digits} hex digits")
        return text.lower()

    return read_hex


# Written again, for `config`.


def plain(value: Rule | Route) -> dict[str, str | list[str]]:
    """Give a rule or a route as the file has it, without what is not set."""
    found: dict[str, str | list[str]] = {}
    for key in RULE_KEYS if isinstance(value, Rule) else ROUTE_KEYS:
        item = getattr(value, key)
        if isinstance(item, Allow):
            item = item.text.split(",")
        if item is not None:
            found[key] = list(item) if isinstance(item, list | tuple) else str(item)
    return found


def toml_lines(key: str, values: tuple[Rule | Route, ...], source: str) -> Iterator[str]:
    """Write the tables of `key` as TOML that reads the same, with `source` as a comment."""
    for value in values:
        yield ""
        yield f"[[{key}]]  # {source}"
        for name, item in plain(value).items():
            # JSON's strings and lists of them are TOML's where they are printable, as all are.
            yield f"{name} = {json.dumps(item, ensure_ascii=False)}"


def as_markdown() -> str:
    """Write the tables of all keys for the documentation."""
    rows = []
    for key, names in ((RULE, RULE_KEYS), (ROUTE, ROUTE_KEYS)):
        rows += [f"| key of `[[{key}]]` | when it is not there | accepted |", "|---|---|---|"]
        for name in names:
            accepted = _stars("`\\g<0>`", ACCEPTED[name])
            rows.append(f"| `{name}` | {_WITHOUT.get(name, 'all')} | {accepted} |")
        rows.append("")
    return "\n".join(rows)


_stars = re.compile(r"/?\*+").sub
_WITHOUT = {
    "name": "`rule` and its number",
    "action": "an error",
    "host": "all, if there is a path",
    "path": "all, if there is a host",
    "backend": "an error",
}
