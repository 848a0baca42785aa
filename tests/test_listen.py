from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dstack_mesh import listen
from dstack_mesh.listen import ListenError, bind, bound_address, unlink_if_ours
from dstack_mesh.model import Address, TcpAddress, UnixAddress


@contextmanager
def _bound(address: Address, mode: int = 0o600) -> Iterator[listen.ListeningSocket]:
    with bind(address, mode=mode) as sock:
        yield sock
    unlink_if_ours(sock)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")


def _answers(address: Address) -> bool:
    where, family = (
        (address.path, socket.AF_UNIX)
        if isinstance(address, UnixAddress)
        else ((address.host, address.port), socket.AF_INET6 if ":" in address.host else 0)
    )
    with socket.socket(family or socket.AF_INET) as client:
        client.settimeout(5)
        try:
            client.connect(where)
        except OSError:
            return False
    return True


def test_port_0_takes_a_free_port() -> None:
    with _bound(TcpAddress("127.0.0.1", 0)) as sock:
        address = bound_address(sock)
        assert isinstance(address, TcpAddress)
        assert address.host == "127.0.0.1"
        assert address.port > 0
        assert not sock.getblocking()
        assert _answers(address)


def test_a_name_is_resolved() -> None:
    with _bound(TcpAddress("localhost", 0)) as sock:
        assert _answers(bound_address(sock))


@needs_ipv6
def test_ipv6() -> None:
    with _bound(TcpAddress("::1", 0)) as sock:
        address = bound_address(sock)
        assert str(address).startswith("[::1]:")
        assert _answers(address)


@needs_ipv6
def test_all_of_ipv6_is_ipv4_too() -> None:
    with _bound(TcpAddress("::", 0)) as sock:
        address = bound_address(sock)
        assert isinstance(address, TcpAddress)
        assert _answers(TcpAddress("127.0.0.1", address.port))


def test_a_port_can_be_taken_again_at_once() -> None:
    with _bound(TcpAddress("127.0.0.1", 0)) as sock:
        address = bound_address(sock)
        with socket.create_connection(sock.getsockname(), timeout=5):
            sock.accept()[0].close()  # closed first on our side: it is left in TIME_WAIT
    with _bound(address) as again:
        assert bound_address(again) == address


def test_a_port_in_use_is_said() -> None:
    with _bound(TcpAddress("127.0.0.1", 0)) as sock:
        address = bound_address(sock)
        with pytest.raises(ListenError, match="another process listens there") as caught:
            bind(address)
        assert str(address) in str(caught.value)
        assert caught.value.address == address


def test_an_address_of_another_machine_is_said() -> None:
    with pytest.raises(ListenError, match="no interface of this machine"):
        bind(TcpAddress("192.0.2.1", 0))


def test_a_name_that_does_not_resolve_is_said() -> None:
    with pytest.raises(ListenError, match=r"nowhere\.invalid:0: the name does not resolve"):
        bind(TcpAddress("nowhere.invalid", 0))


@pytest.mark.parametrize(
    ("address", "said"),
    [(TcpAddress("h", 80), "CAP_NET_BIND_SERVICE"), (UnixAddress("/a/b"), "may not make files")],
)
def test_a_refused_permission_says_what_to_do(address: Address, said: str) -> None:
    assert said in listen._reason(address, PermissionError(13, "Permission denied"))


def test_an_error_without_words_of_ours_keeps_its_own() -> None:
    assert listen._reason(UnixAddress("/a"), OSError(5, "I/O error")) == "I/O error"
    assert listen._reason(UnixAddress("/a"), OSError("odd")) == "odd"


def test_a_unix_socket(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "mesh.sock"))
    with _bound(address) as sock:
        assert bound_address(sock) == address
        assert _answers(address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0, 0o600), (0o077, 0o666), (0o777, 0o660)])
def test_a_unix_sockets_mode_is_the_one_asked_for(tmp_path: Path, mask: int, mode: int) -> None:
    path = tmp_path / "mesh.sock"
    with _umask(mask), _bound(UnixAddress(str(path)), mode):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_unix_socket_is_at_no_time_more_open_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mesh.sock"
    seen: list[int] = []

    def chmod(self: Path, _mode: int) -> None:
        seen.append(stat.S_IMODE(self.stat().st_mode))

    monkeypatch.setattr(Path, "chmod", chmod)
    with _umask(0), _bound(UnixAddress(str(path)), 0o600):
        assert seen == [0o600]


def test_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "mesh.sock"))
    bind(address).close()
    assert Path(address.path).is_socket()
    with _bound(address):
        assert _answers(address)


def test_a_socket_on_which_somebody_answers_is_left_alone(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "mesh.sock"))
    with _bound(address):
        with pytest.raises(ListenError, match="another process listens there"):
            bind(address)
        assert _answers(address)


def test_a_socket_with_a_full_backlog_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(path)
        busy.listen(0)
        first.setblocking(False)
        first.connect(path)
        with pytest.raises(ListenError, match="another process listens there"):
            bind(UnixAddress(path))


def test_a_socket_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(path))
        with pytest.raises(ListenError, match="there is a socket already"):
            bind(UnixAddress(str(path)))
        assert path.is_socket()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ListenError, match="not a socket"):
        bind(UnixAddress(str(path)))
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ListenError, match="not a socket"):
        bind(UnixAddress(str(link)))
    assert path.read_text() == "data"


def test_a_missing_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="its directory does not exist"):
        bind(UnixAddress(str(tmp_path / "none" / "mesh.sock")))


def test_a_file_in_the_directorys_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ListenError, match="its directory is not a directory"):
        bind(UnixAddress(str(tmp_path / "file" / "mesh.sock")))


def test_another_processs_socket_at_our_path_is_not_removed(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "mesh.sock"))
    with bind(address) as ours:
        Path(address.path).unlink()
        with _bound(address):
            unlink_if_ours(ours)
            assert _answers(address)


def test_unlink_leaves_tcp_and_what_is_gone_alone(tmp_path: Path) -> None:
    with bind(TcpAddress("127.0.0.1", 0)) as tcp:
        unlink_if_ours(tcp)
    with bind(UnixAddress(str(tmp_path / "mesh.sock"))) as gone:
        unlink_if_ours(gone)
        unlink_if_ours(gone)
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_start_together_one_gets_a_stale_path(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "mesh.sock"))
    for _ in range(20):
        bind(address).close()
        won: list[listen.ListeningSocket] = []
        start = threading.Barrier(4)

        def race(won: list[listen.ListeningSocket] = won, start: threading.Barrier = start) -> None:
            start.wait(5)
            with suppress(ListenError):
                won.append(bind(address))

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(won) == 1
        assert _answers(address)
        won[0].close()


def test_nothing_is_left_open_or_lying_around_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "BACKLOG", "many")
    with pytest.raises(TypeError):
        bind(UnixAddress(str(tmp_path / "mesh.sock")))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_somebody_keeps_locked_is_used_all_the_same(tmp_path: Path) -> None:
    """As the simulator keeps its own; `listen` locks it only against others that do the same."""
    holder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        address = UnixAddress(str(tmp_path / "a.sock"))
        with _bound(address):
            assert _answers(address)
        assert not Path(address.path).exists()
    finally:
        os.close(holder)


def test_a_dead_client_of_a_silent_stream_is_noticed() -> None:
    with (
        bind(TcpAddress("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        listening.setblocking(True)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4


def test_a_set_group_id_directory_shares_its_sockets(tmp_path: Path) -> None:
    """And no other does: see docs/nginx.md."""
    for name, directory_mode, mode in (("shared", 0o2710, 0o660), ("own", 0o710, 0o600)):
        directory = tmp_path / name
        directory.mkdir()
        directory.chmod(directory_mode)
        with listen.bind(UnixAddress(str(directory / "s"))):
            assert stat.S_IMODE((directory / "s").stat().st_mode) == mode
