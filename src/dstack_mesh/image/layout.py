"""Where the image keeps what it makes while running: one directory in memory, of known owners.

| path | owner, mode | what |
|---|---|---|
| `auth/` | mesh, group of nginx, 2710 | the auth service's socket; nobody else reaches it |
| `agent/` | the agent socket's owner, group of mesh, 2710 | a bridge's socket |
| `identity/` | root, group of nginx, 0750 | generations of key (0600) and certificate |
| `conf/` | root, group of nginx, 0750 | nginx's configuration |
| `nginx/` | nginx, 0700 | its pid file and temporary files |
| `mesh/` | root, group of mesh, 0750 | copies for the mesh of what only root may read |
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

STATE = Path("/dev/shm/dstack-mesh")  # noqa: S108 - docker gives each container its own
"""In memory: a private key is in here."""

AUTH_SOCKET = STATE / "auth" / "auth.sock"
AGENT_SOCKET = STATE / "agent" / "agent.sock"
SYS_CONFIG = STATE / "mesh" / "sys-config.json"
IDENTITY = STATE / "identity"
NGINX_CONFIG = STATE / "conf" / "nginx.conf"
NGINX = STATE / "nginx"


class LayoutError(Exception):
    """The directory cannot be made as it has to be; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is to own a file, by number; -1 leaves it as it is."""

    uid: int
    gid: int


def make_state(state: Path = STATE, mounts: str | None = None) -> None:
    """Make an empty `state`, what an earlier run left in it removed.

    `mounts` is the text of /proc/self/mounts. Raises LayoutError where it would not be in memory.
    """
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    kind = file_system(str(state), text)
    if kind not in ("tmpfs", "ramfs"):
        raise LayoutError(
            f"{state} would be on {kind or 'no known file system'}, and what is in it must never"
            f" touch a disk: mount a tmpfs on {state.parent}"
        )
    shutil.rmtree(state, ignore_errors=True)
    try:
        state.mkdir(mode=0o711)
    except OSError as error:
        raise LayoutError(f"{state} cannot be made: {error.strerror}") from error
    state.chmod(0o711)


def make_directory(path: Path, owner: Owner | None, mode: int) -> None:
    """Make one directory below the state, owned by `owner` where there is one."""
    path.mkdir(mode=0o700)
    path.chmod(mode)  # while it is still ours: it takes no capability then
    if owner is not None:
        os.chown(path, owner.uid, owner.gid)


def file_system(path: str, mounts: str) -> str:
    """Give the type of the file system that `path` is or would be on, by the text of `mounts`."""
    found, kind = "", ""
    for line in mounts.splitlines():
        _, where, what, *_ = line.split(" ")
        inside = path == where or path.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(found):  # of two on one place the later one counts
            found, kind = where, what
    return kind
