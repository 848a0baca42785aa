"""The impostor's own counting: if it missed bytes, every test that relies on it would pass."""

from __future__ import annotations

import contextlib
import socket
import ssl

import pytest

from dstack_mesh.model import AppId
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor, ok_answer
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import Kind, impostor_chain

APP = AppId("aa" * 20)
OTHER = AppId("bb" * 20)
KMS = Kms.create(b"impostor")


def client_context(
    issued: Issued | None = None,
    *,
    verify: bool = True,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = version
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    context.load_verify_locations(cadata=KMS.root_pem.decode())
    if issued is not None:
        issued.load_into(context)
    return context


def connect(
    impostor: Impostor, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> ssl.SSLSocket:
    address = impostor.address.host, impostor.address.port
    plain = socket.create_connection(address, timeout=10)
    try:
        return context.wrap_socket(plain, session=session)
    except BaseException:
        plain.close()
        raise


BOTH_VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@BOTH_VERSIONS
def test_a_handshake_alone_is_no_application_byte(version: ssl.TLSVersion) -> None:
    with Impostor(impostor_chain(KMS, Kind.OTHER_APP, APP, OTHER)) as impostor:
        connect(impostor, client_context(version=version)).close()
        impostor.wait(lambda: impostor.closed == 1)
        assert (impostor.connections, impostor.handshakes) == (1, 1)
        assert impostor.application_bytes == 0
        assert impostor.received == b""


@BOTH_VERSIONS
def test_bytes_are_counted_and_kept_at_once(version: ssl.TLSVersion) -> None:
    with Impostor(KMS.issue(APP)) as impostor:
        with connect(impostor, client_context(version=version)) as client:
            client.sendall(b"G")
            impostor.wait(lambda: impostor.application_bytes == 1)
            client.sendall(b"ET / secret")
            impostor.wait(lambda: impostor.application_bytes == 12)
        with connect(impostor, client_context(version=version)) as client:
            client.sendall(bytes(100_000))
            impostor.wait(lambda: impostor.application_bytes == 100_012)
        assert impostor.received.startswith(b"GET / secret\0")
        assert len(impostor.received) == 65_536


def test_a_client_that_refuses_is_a_failure_and_no_handshake() -> None:
    with Impostor(impostor_chain(KMS, Kind.OTHER_KMS, APP, OTHER)) as impostor:
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(impostor, client_context())
        impostor.wait(lambda: len(impostor.failures) == 1)
        assert impostor.handshakes == 0


@pytest.mark.parametrize("kind", list(Kind))
def test_every_impostor_chain_can_be_shown(kind: Kind) -> None:
    with Impostor(impostor_chain(KMS, kind, APP, OTHER)) as impostor:
        context = client_context(verify=False)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        connect(impostor, context).close()
        impostor.wait_for_handshakes(1)


def test_client_certificate_is_asked_for_but_not_needed() -> None:
    with Impostor(KMS.issue(APP), client_ca_pem=KMS.root_pem) as impostor:
        for context in (client_context(KMS.issue(OTHER)), client_context()):
            with connect(impostor, context) as client:
                client.sendall(b"x")
        impostor.wait(lambda: impostor.application_bytes == 2)


def test_client_certificate_of_another_kms_fails() -> None:
    stranger = Kms.create().issue(OTHER)
    with Impostor(KMS.issue(APP), client_ca_pem=KMS.root_pem) as impostor:
        with (
            connect(impostor, client_context(stranger)) as client,
            contextlib.suppress(ssl.SSLError, ConnectionError),
        ):
            client.recv(1)
        impostor.wait(lambda: len(impostor.failures) == 1)


@BOTH_VERSIONS
@pytest.mark.parametrize("tickets", [True, False])
def test_session_outlives_a_change_of_chain(tickets: bool, version: ssl.TLSVersion) -> None:
    """The dangerous case: good at first, then resumed by somebody who holds other keys."""
    context = client_context(version=version)
    with Impostor(KMS.issue(APP), answer=ok_answer, tickets=tickets) as impostor:
        with connect(impostor, context) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert client.recv(1_000).endswith(b"\r\n\r\nok")
            session = client.session
        impostor.show(KMS.issue(OTHER))
        with connect(impostor, context, session) as client:
            resumed = client.session_reused
            leaf = client.getpeercert(binary_form=True)
        impostor.wait(lambda: impostor.closed == 2)
    assert resumed is tickets
    assert impostor.resumed == int(tickets)
    assert leaf is not None
    assert bytes.fromhex("0414" + (APP if tickets else OTHER)) in leaf


def test_answers_come_once_a_head_is_complete() -> None:
    with (
        Impostor(KMS.issue(APP), answer=ok_answer) as impostor,
        connect(impostor, client_context()) as client,
    ):
        for _ in range(2):
            client.sendall(b"GET / HTTP/1.1\r\n")
            client.sendall(b"\r\n")
            assert client.recv(1_000).startswith(b"HTTP/1.1 200 OK\r\n")
        impostor.drop_connections()
        with contextlib.suppress(OSError):
            assert client.recv(1) == b""


def test_tls_versions_are_limited() -> None:
    only_old = Impostor(KMS.issue(APP), max_version=ssl.TLSVersion.TLSv1_2)
    with only_old, connect(only_old, client_context()) as client:
        assert client.version() == "TLSv1.2"


def test_wait_gives_up() -> None:
    with Impostor(KMS.issue(APP)) as impostor, pytest.raises(TimeoutError, match="0 handshakes"):
        impostor.wait_for_handshakes(1, 0.01)


def test_close_ends_open_connections_and_unfinished_handshakes() -> None:
    impostor = Impostor(KMS.issue(APP))
    address = impostor.address.host, impostor.address.port
    silent = socket.create_connection(address, timeout=10)
    open_one = connect(impostor, client_context())
    impostor.wait(lambda: impostor.connections == 2 and impostor.handshakes == 1)
    impostor.close()
    for client in (silent, open_one):
        with contextlib.suppress(OSError):
            assert client.recv(1) == b""
        client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)
