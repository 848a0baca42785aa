from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from dstack_mesh.cli import certificates
from dstack_mesh.cli.certificates import (
    UnreadableError,
    describe,
    fetch_certificates,
    judge,
    read_certificates,
)
from dstack_mesh.model import AppId, Role, TcpAddress
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import Kind, impostor_chain

if TYPE_CHECKING:
    from collections.abc import Iterator

CERTS = Path(__file__).parent.parent / "vectors" / "certs"
VECTORS: list[dict[str, Any]] = json.loads((CERTS / "index.json").read_text())["vectors"]
NOW = time.time()
APP = AppId("ab" * 20)


def chain(name: str) -> list[x509.Certificate]:
    file = name if name.endswith(".pem") else f"{name}.chain.pem"
    return read_certificates((CERTS / file).read_bytes())


ROOT = chain("kms1-root")[0]


# Reading


def test_pem_der_and_a_chain_with_other_blocks() -> None:
    leaf = (CERTS / "leaf-a.pem").read_bytes()
    key = (CERTS / "leaf-a.key").read_bytes()
    (read,) = read_certificates(leaf)
    assert read_certificates(read.public_bytes(serialization.Encoding.DER)) == [read]
    assert read_certificates(b"some words\n" + key + leaf + key) == [read]
    assert len(chain("leaf-a")) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b"\x00\xff" * 500, "neither a PEM nor a DER certificate"),
        (b"\x30\x03\x02\x01\x01", "neither a PEM nor a DER certificate"),
        (b"hello", "neither a PEM nor a DER certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "neither a PEM nor"),
        (b"-----BEGIN CERTIFICATE-----\n", "neither a PEM nor"),
        (b"-----BEGIN DH PARAMETERS-----\n", "it holds something else and no certificate"),
        ((CERTS / "leaf-a.key").read_bytes(), "it holds a private key and no certificate"),
    ],
)
def test_what_holds_no_certificate(content: bytes, says: str) -> None:
    with pytest.raises(UnreadableError, match=says) as refused:
        read_certificates(content)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


# Judging


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_vectors_are_judged_as_a_mesh_under_kms1_does(vector: dict[str, Any]) -> None:
    verdict = judge(chain(vector["name"]), ROOT, list(Role), NOW)
    assert verdict.holds == (vector["trust_under_kms1"] == "ok")
    assert verdict.app_id == (vector["app_id"] if verdict.holds else None)
    assert bool(verdict.reason) != verdict.holds


@pytest.mark.parametrize(
    ("name", "roles", "reason"),
    [
        ("leaf-a", (Role.TARGET, Role.CALLER), ""),
        ("leaf-a-serveronly", (Role.TARGET,), ""),
        ("leaf-a-clientonly", (Role.CALLER,), ""),
        ("leaf-a-expired", (), "chain rule 1: the leaf is valid from"),
        (
            "leaf-a-foreign-kms",
            (),
            "the last certificate of its chain is signed by itself, and not by",
        ),
        ("odd-selfsigned-a", (), "the leaf is signed by itself, and not by the root"),
        ("leaf-a.pem", (), "the leaf is signed neither by another that is there nor by the root"),
        ("odd-leaf-as-ca", (), "the verified chain has 4 certificate"),
        ("leaf-a-direct-root", (), "the verified chain has 2 certificate"),
        ("leaf-b-under-a-ca", (), "chain rule 3: the leaf says app-id bbbb"),
        ("leaf-noappid", (), "chain rule 2: the leaf: no app-id extension"),
    ],
)
def test_roles_and_reasons(name: str, roles: tuple[Role, ...], reason: str) -> None:
    verdict = judge(chain(name), ROOT, list(Role), NOW)
    assert verdict.roles == roles
    assert reason in verdict.reason


def test_only_the_role_asked_for_counts() -> None:
    verdict = judge(chain("leaf-a-clientonly"), ROOT, [Role.TARGET], NOW)
    assert not verdict.holds
    assert "lacks serverAuth, which a target needs" in verdict.reason


def test_what_comes_along_is_not_trusted_and_its_order_is_free() -> None:
    leaf, app_ca, root = chain("leaf-a")
    foreign_root = chain("kms2-root")[0]
    assert judge([leaf, foreign_root, root, app_ca], ROOT, list(Role), NOW).holds
    assert judge([leaf, app_ca], ROOT, list(Role), NOW).holds
    assert not judge([leaf], ROOT, list(Role), NOW).holds
    assert not judge([leaf, app_ca, root], foreign_root, list(Role), NOW).holds
    assert not judge([app_ca, leaf, root], ROOT, list(Role), NOW).holds


def test_dates_are_those_of_the_moment() -> None:
    assert "and now it is 2100" in judge(chain("leaf-a"), ROOT, list(Role), 4_102_444_801).reason


@pytest.mark.parametrize("kind", list(Kind))
def test_every_impostor_is_found_out(kind: Kind) -> None:
    kms = Kms.create(b"inspect")
    other = AppId("cd" * 20)
    links = read_certificates(b"".join(impostor_chain(kms, kind, APP, other).chain_pem))
    (root,) = read_certificates(kms.root_pem)
    verdict = judge(links, root, list(Role), NOW)
    if kind in (Kind.OTHER_APP, Kind.CLIENT_ONLY_EKU, Kind.SERVER_ONLY_EKU):
        assert verdict.holds
        assert (verdict.app_id == APP) == (kind is not Kind.OTHER_APP)
    else:
        assert not verdict.holds


# Describing


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_vectors_are_shown_as_the_real_software_reads_them(vector: dict[str, Any]) -> None:
    shown = describe(chain(vector["name"])[0], NOW).fields
    if vector["trust_under_kms1"] == "odd-encoding":
        assert str(shown["app_id"]).startswith("not readable: the app-id extension")
    else:
        assert shown["app_id"] == vector["app_id"]
    assert shown["usage"] == vector["special_usage"]
    assert (shown["ca"] == "no") == (vector["basic_constraints"] is None)
    assert (shown["extended_key_usage"] or []) == vector["eku"]
    assert (shown["app_info"] is None) == (vector["app_info"] is None)


def test_a_leaf_with_everything() -> None:
    described = describe(chain("leaf-a-appinfo")[0], NOW)
    assert described.app_id == "aa" * 20
    assert described.fields["subject"] == "CN=localhost"
    assert described.fields["issuer"] == "CN=Dstack App CA,O=Dstack"
    assert described.fields["validity"] == "valid"
    assert described.fields["not_before"] == "1975-01-01T00:00:00Z"
    assert described.fields["key"] == "EC secp256r1"
    assert isinstance(described.fields["app_info"], dict)
    assert described.fields["app_info"]["compose_hash"] == "11" * 32
    assert json.dumps(described.fields)


def test_dates_and_names() -> None:
    assert describe(chain("leaf-a-expired")[0], NOW).fields["validity"] == "expired"
    assert describe(chain("leaf-a-notyet")[0], NOW).fields["validity"] == "not yet valid"
    assert describe(chain("leaf-a-san")[0], NOW).fields["alt_names"]
    assert describe(ROOT, NOW).fields["ca"] == "yes, path length 1"


def made(key: Any, *extensions: x509.ExtensionType, name: str = "x") -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    then = chain("leaf-a")[0].not_valid_before_utc
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, then, then)
    for value in extensions:
        builder = builder.add_extension(value, critical=False)
    signer = ec.generate_private_key(ec.SECP256R1())
    return builder.sign(signer, hashes.SHA256())


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (rsa.generate_private_key(65537, 1024), "RSA 1024 bits"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
    ],
)
def test_other_keys_are_named(key: Any, shown: str) -> None:
    assert describe(made(key), NOW).fields["key"] == shown


def test_a_ca_without_a_path_length_and_what_a_terminal_must_not_see() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    alt = x509.SubjectAlternativeName([x509.DNSName("a\x1b[31m\nb")])
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    shown = describe(made(key, alt, constraints, name="evil\x1b]0title\x07"), NOW).fields
    assert shown["subject"] == "CN=evil\\x1b]0title\\x07"
    assert shown["alt_names"] == ["a\\x1b[31m\\nb"]
    assert shown["ca"] == "yes"


def test_what_cannot_be_read_says_why() -> None:
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.37"), b"\x04\x00")
    shown = describe(made(ed25519.Ed25519PrivateKey.generate(), odd), NOW)
    assert shown.app_id is None
    for name in ("app_id", "usage", "ca", "extended_key_usage", "alt_names", "app_info"):
        assert str(shown.fields[name]).startswith("not readable: its extensions cannot be parsed")
    assert shown.fields["subject"] == "CN=x"


# Over TLS


@contextlib.contextmanager
def tls_server(name: str, **settings: Any) -> Iterator[tuple[TcpAddress, list[str | None]]]:
    """A TLS server with a vector's chain; what server names it was asked for."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.load_cert_chain(CERTS / f"{name}.chain.pem", CERTS / f"{name}.key")
    context.sni_callback = lambda _object, asked, _context: names.append(asked)
    for key, value in settings.items():
        setattr(context, key, value)

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                with context.wrap_socket(connection, server_side=True) as tls:
                    assert tls.recv(1) == b"", "nothing is sent after the handshake"

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        yield TcpAddress("127.0.0.1", listener.getsockname()[1]), names
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("name", ["leaf-a", "leaf-a-expired", "odd-selfsigned-a"])
def test_what_a_server_sends_is_read_without_judging_it(name: str) -> None:
    with tls_server(name) as (address, names):
        assert fetch_certificates(address, "a.example") == chain(name)
        assert names == ["a.example"]


def test_a_server_that_asks_for_a_certificate_and_has_only_tls_1_2() -> None:
    asks = {"verify_mode": ssl.CERT_OPTIONAL, "maximum_version": ssl.TLSVersion.TLSv1_2}
    with tls_server("leaf-a", **asks) as (address, names):
        assert fetch_certificates(address, None) == chain("leaf-a")
        assert names == [None]


def test_later_pythons_give_the_chain_by_a_public_method() -> None:
    class Later:
        def get_unverified_chain(self) -> list[bytes]:
            return [b"leaf", b"ca"]

    assert certificates._sent_chain(Later()) == [b"leaf", b"ca"]  # type: ignore[arg-type]


def test_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UnreadableError, match="no connection: Connection refused"):
        fetch_certificates(TcpAddress("127.0.0.1", port), None)


def test_a_host_name_that_can_not_be() -> None:
    with pytest.raises(UnreadableError, match="no connection: "):
        fetch_certificates(TcpAddress("a" * 70, 1), None)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS session: "),
        (b"", "no (TLS session|connection)"),
    ],
)
def test_a_server_without_tls(answer: bytes, says: str) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            connection.recv(10_000)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnreadableError, match=says):
            fetch_certificates(TcpAddress("127.0.0.1", listener.getsockname()[1]), None)
        thread.join(10)


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "HANDSHAKE_TIMEOUT", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(UnreadableError, match=r"no answer within 0\.05 s"),
    ):
        fetch_certificates(TcpAddress("127.0.0.1", listener.getsockname()[1]), None)
