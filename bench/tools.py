"""The programs that the races need: where they are, what to install for them, their versions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

_PATH = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"

PACKAGES = {
    "nginx": "nginx-light",
    "haproxy": "haproxy",
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "curl": "curl",
}
"""Debian's and Ubuntu's packages by the program that is in them."""

_VERSION = {
    "nginx": ["-v"],
    "haproxy": ["-v"],
    "wrk": ["-v"],
    "h2load": ["--version"],
    "curl": ["--version"],
}
_NUMBER = re.compile(r"\d+\.\d+[\w.+-]*")


class MissingToolError(Exception):
    """A program is not there; the text says what to install."""


def find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path=_PATH)


def missing(tools: Iterable[str]) -> list[str]:
    return [tool for tool in tools if find(tool) is None]


def how_to_install(tools: Iterable[str]) -> str:
    """Say what is missing and the command that gets it; nothing is installed by the harness."""
    names = list(tools)
    packages = " ".join(PACKAGES[name] for name in names)
    return (
        f"{', '.join(names)} not found: apt-get install --no-install-recommends {packages}"
        " (Debian or Ubuntu)"
    )


def path(tool: str) -> str:
    """Give where the program is. Raises `MissingToolError`."""
    found = find(tool)
    if found is None:
        raise MissingToolError(how_to_install([tool]))
    return found


def version(tool: str) -> str:
    """Give the version that the program tells of itself."""
    if find(tool) is None:
        return "not there"
    done = subprocess.run([path(tool), *_VERSION[tool]], capture_output=True, text=True)
    match = _NUMBER.search(done.stdout + done.stderr)
    return match[0] if match else "unknown"
