"""One value of a setting: text to value, and value back to text that means the same.

Every parser takes the text as it was given and raises `ValueError` when it is not accepted; what
is accepted is said in the schema's own words (`Kind.accepts`), so that errors, help and docs agree.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath

from dstack_mesh.model import Address, AppId, TcpAddress, UnixAddress

_DIGITS = re.compile(r"[0-9]{1,9}")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_APP_ID = re.compile(r"[0-9a-f]{40}")
_MAX_UNIX_PATH = 107  # sockaddr_un.sun_path is 108 bytes, its last one the NUL
_MAX_HOST = 253  # RFC 1035 2.3.4, without the final dot

_MOST_WORKERS = 64


def host(text: str) -> str:
    """Read a host name or an IPv4 address, or an IPv6 address in brackets (RFC 3986 3.2.2)."""
    if text.startswith("[") and text.endswith("]"):
        return str(ipaddress.IPv6Address(text[1:-1]))
    labels = text.removesuffix(".").split(".")
    if len(text) > _MAX_HOST or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError
    if labels[-1].isdigit():  # no top-level domain is all digits: it is meant as an address
        return str(ipaddress.IPv4Address(text))
    return text


def port(text: str, *, least: int = 1) -> int:
    """Read a port from `least` to 65535, in decimal digits."""
    if not _DIGITS.fullmatch(text) or not least <= int(text) <= 65535:
        raise ValueError
    return int(text)


def tcp(text: str, *, least_port: int = 1) -> TcpAddress:
    """Read `host:port` or `[v6]:port`."""
    name, colon, number = text.rpartition(":")
    if not colon:
        raise ValueError
    return TcpAddress(host(name), port(number, least=least_port))


def unix(text: str) -> UnixAddress:
    """Read `unix:/path`; the path is absolute and short enough for a socket address."""
    path = text.removeprefix("unix:")
    if path == text or not path.startswith("/") or not PurePosixPath(path).name:
        raise ValueError
    if len(path.encode()) > _MAX_UNIX_PATH or not path.isprintable():
        raise ValueError
    return UnixAddress(path)


def listen(text: str) -> Address | None:
    """Read a listener's address: `host:port` (0 is any free port), `unix:/path`, or `off`."""
    if text == "off":
        return None
    return listen_on(text)


def listen_on(text: str) -> Address:
    """Read a listener's address as `listen` does, where it cannot be `off`."""
    return unix(text) if text.startswith("unix:") else tcp(text, least_port=0)


def server_name(text: str) -> str:
    """Read names for nginx's `server_name`: `_`, host names, and `*.` before one."""
    names = text.split(" ")
    if not all(host(name.removeprefix("*.")) for name in names):
        raise ValueError
    return text


def http_base(text: str) -> Address:
    """Read `http://host:port` (a final `/` is allowed) or `unix:/path`."""
    if text.startswith("unix:"):
        return unix(text)
    authority = text.removeprefix("http://")
    if authority == text:
        raise ValueError
    return tcp(authority.removesuffix("/"))


def backend(text: str) -> Address:
    """Read `host:port`, `http://host:port` or `unix:/path`."""
    return http_base(text) if text.startswith(("unix:", "http://")) else tcp(text)


def duration(text: str) -> float:
    """Read `250ms`, `30s`, `5m`, `24h` or plain seconds, more than 0; the answer is in seconds."""
    seconds = duration_or_none(text)
    if seconds == 0:
        raise ValueError
    return seconds


def duration_or_none(text: str) -> float:
    """Read a duration as `duration` does, where `0` stands for no limit."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError
    # Rounded to the millisecond's thousandth: 250ms is 0.25, not what 250 times 0.001 gives.
    return round(float(match[1]) * _SECONDS[match[2] or "s"], 6)


def count(text: str) -> int:
    """Read a whole number from 1 to 999,999,999."""
    if not _DIGITS.fullmatch(text) or int(text) == 0:
        raise ValueError
    return int(text)


def workers(text: str) -> int:
    """Read a number of processes, from 1 to 64."""
    number = count(text)
    if number > _MOST_WORKERS:
        raise ValueError
    return number


def path(text: str) -> str:
    """Read a file's path."""
    if not text or not text.isprintable():
        raise ValueError
    return text


def show_duration(seconds: float) -> str:
    """Write `seconds` in the largest unit in which it is whole; `0` for none."""
    micros = round(seconds * 1_000_000)
    if micros == 0:
        return "0"
    for unit, size in (("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000)):
        if micros % size == 0:
            return f"{micros // size}{unit}"
    return f"{micros / 1000:g}ms"


def show_base(value: Address) -> str:
    """Write an address the way `http_base` reads it."""
    return f"http://{value}" if isinstance(value, TcpAddress) else str(value)


def app_ids(text: str) -> frozenset[AppId]:
    """Read app-ids, at least one, with commas between."""
    items = [item.strip().lower() for item in text.split(",")]
    if not all(_APP_ID.fullmatch(item) for item in items):
        raise ValueError
    return frozenset(AppId(item) for item in items)


def show_app_ids(value: frozenset[AppId]) -> str:
    """Write what `app_ids` reads."""
    return ",".join(sorted(value))
