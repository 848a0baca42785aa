"""Listening sockets: TCP and unix, with errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.model import Address, TcpAddress, UnixAddress

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKLOG = 1024

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where others listen

_LOCK_PATIENCE = 0.5
"""Seconds."""

KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A dead peer of a silent stream is noticed within two minutes. Accepted sockets inherit these."""

_REASONS = {
    errno.EADDRINUSE: "another process listens there: end it, or choose another address",
    errno.EADDRNOTAVAIL: "no interface of this machine has this address",
    errno.EAFNOSUPPORT: "this machine has no such kind of address (IPv6 may be off)",
    errno.ENOENT: "its directory does not exist",
    errno.ENOTDIR: "its directory is not a directory",
    errno.EROFS: "the file system is read-only",
}


class ListenError(Exception):
    """An address on which listening failed; the message names it, the reason and what to do."""

    def __init__(self, address: Address, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")
        self.address = address


class ListeningSocket(socket.socket):
    """A listening socket that knows which file on the disk, if any, is its own."""

    own_file: tuple[str, int, int] | None = None
    """Path, device and inode of a unix socket."""


def bind(address: Address, *, mode: int | None = None) -> ListeningSocket:
    """Open a non-blocking socket that listens on `address`; port 0 takes any free port.

    A unix socket's file gets `mode`, whatever the umask is, and replaces one that a process left
    behind. By default it is for its owner alone, and for the group too in a set-group-id
    directory, which is made to be shared by that group.
    A path on which somebody answers, or that is not a socket, is never taken over.
    `[::]` takes IPv4 too where the machine allows it. Raises ListenError.
    """
    try:
        if isinstance(address, UnixAddress):
            return _bind_unix(address, _mode(address.path) if mode is None else mode)
        return _bind_tcp(address)
    except OSError as error:
        raise ListenError(address, _reason(address, error)) from error


def bound_address(sock: socket.socket) -> Address:
    """Give the address that `sock` is bound to, its port the one actually taken."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return UnixAddress(name)
    return TcpAddress(name[0], name[1])


def reachable(address: Address) -> Address:
    """Give where this machine reaches a listener on `address`: loopback for all interfaces."""
    if isinstance(address, TcpAddress) and address.host in _WILDCARDS:
        return TcpAddress(_WILDCARDS[address.host], address.port)
    return address


def unlink_if_ours(sock: ListeningSocket) -> None:
    """Remove the file of a unix socket, open or closed, unless another's has taken its place."""
    if sock.own_file is None:
        return
    path, device, inode = sock.own_file
    with suppress(OSError), _directory_locked(path):
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) == (device, inode):
            Path(path).unlink()


def _bind_tcp(address: TcpAddress) -> ListeningSocket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = ListeningSocket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            only_v6 = address.host != "::"
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        for option in KEEPALIVE:
            sock.setsockopt(*option)
        sock.setblocking(False)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _mode(path: str) -> int:
    shared = Path(path).parent.stat().st_mode & stat.S_ISGID
    return 0o660 if shared else 0o600


def _bind_unix(address: UnixAddress, mode: int) -> ListeningSocket:
    path = address.path
    sock = ListeningSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with _directory_locked(path):
            _remove_stale(address)
            # Before bind this bounds the mode of the file to come (unix(7)), so that it is at no
            # time more open than asked for; after bind chmod adds what the umask took away.
            os.fchmod(sock.fileno(), mode)
            sock.bind(path)
            found = os.lstat(path)
            sock.own_file = (path, found.st_dev, found.st_ino)
            Path(path).chmod(mode)
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        unlink_if_ours(sock)
        raise
    return sock


def _remove_stale(address: UnixAddress) -> None:
    path = address.path
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ListenError(address, "there is a file that is not a socket: remove it yourself")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:  # the process that listened here is gone
            Path(path).unlink()
            return
        except BlockingIOError:  # somebody listens whose backlog is full
            pass
        except OSError as error:  # not ours to reach, or another kind of socket
            raise ListenError(
                address, f"there is a socket already ({os.strerror(error.errno or 0)})"
            ) from error
    raise ListenError(address, _REASONS[errno.EADDRINUSE])


@contextmanager
def _directory_locked(path: str) -> Iterator[None]:
    """Let only one process at a time look at, remove and make sockets in `path`'s directory.

    Without it two that start together could each take the other's fresh socket for a stale one.
    """
    directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _try_to_lock(directory)
        yield
    finally:
        os.close(directory)


def _try_to_lock(directory: int) -> None:
    """Wait for the lock, but not for ever: we hold it for a moment, so others use it otherwise.

    The simulator holds its directory's for as long as it runs.
    """
    end = time.monotonic() + _LOCK_PATIENCE
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= end:
            return
        time.sleep(0.01)


def _reason(address: Address, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if error.errno in (errno.EACCES, errno.EPERM):
        if isinstance(address, TcpAddress):
            return (
                "permission denied: a port this low needs root or the capability"
                " CAP_NET_BIND_SERVICE; choose one from 1024 up"
            )
        return "permission denied: this user may not make files in its directory"
    return _REASONS.get(error.errno or 0, error.strerror or str(error))
