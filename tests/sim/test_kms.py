"""The simulated KMS: structure as the real one's, chains that OpenSSL verifies."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.model import AppId, AppInfo
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.kms import Kms

VECTORS = Path(__file__).parents[1] / "vectors" / "certs"
APP_A = AppId("aa" * 20)
APP_B = AppId("bb" * 20)


def load(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def vector(name: str) -> x509.Certificate:
    return load((VECTORS / f"{name}.pem").read_bytes())


def structure(certificate: x509.Certificate) -> list[object]:
    """Everything but key, serial, end date and signature, extension values as raw bytes."""
    extensions = []
    for extension in certificate.extensions:
        value = extension.value
        own = isinstance(value, x509.SubjectKeyIdentifier)
        extensions.append(
            (extension.oid.dotted_string, extension.critical, b"" if own else value.public_bytes())
        )
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return [
        certificate.version,
        certificate.subject.public_bytes(),
        certificate.issuer.public_bytes(),
        certificate.not_valid_before_utc,
        certificate.signature_algorithm_oid,
        key.curve.name,
        extensions,
    ]


def raw_extensions(certificate: x509.Certificate) -> bytes:
    """The extensions' bytes without the subject key identifier's value, which is the key's own."""
    tbs = certificate.tbs_certificate_bytes
    start = tbs.index(bytes.fromhex("300f0603551d0f"))
    for extension in certificate.extensions:
        if isinstance(extension.value, x509.SubjectKeyIdentifier):
            return tbs[start:].replace(extension.value.digest, b"")
    return tbs[start:]


@pytest.mark.parametrize(("name", "position"), [("leaf-a", 0), ("app-a-ca", 1), ("kms1-root", 2)])
def test_chain_is_structured_as_the_real_one(name: str, position: int) -> None:
    ours = load(Kms.create().issue(APP_A).chain_pem[position])
    real = vector(name)
    assert structure(ours) == structure(real)
    assert raw_extensions(ours) == raw_extensions(real)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("leaf-a-serveronly", {"client_auth": False}),
        ("leaf-a-clientonly", {"server_auth": False}),
        ("leaf-a-noeku", {"server_auth": False, "client_auth": False}),
        ("leaf-a-san", {"alt_names": ("localhost", "svc.example", "127.0.0.1")}),
    ],
)
def test_options_give_what_the_real_kms_gives(name: str, options: dict[str, object]) -> None:
    ours = load(Kms.create().issue(APP_A, **options).leaf_pem)  # type: ignore[arg-type]
    assert structure(ours) == structure(vector(name))


def test_local_key_provider_gives_two_certificates_and_no_app_id() -> None:
    kms = Kms.create()
    issued = kms.issue_local()
    assert structure(load(issued.leaf_pem)) == structure(vector("leaf-local-provider"))
    assert issued.chain_pem[1:] == (kms.root_pem,)


def test_subject_key_identifier_is_made_as_the_real_one() -> None:
    real = vector("app-a-ca")
    key = serialization.load_pem_private_key((VECTORS / "app-a-ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    expected = real.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert certs.ca_extensions(key, 0)[1] == (expected, False)


def test_app_info_is_a_message_pack_array_in_the_real_order() -> None:
    info = AppInfo(APP_A, "11" * 32, "22" * 20, "33" * 32, "66" * 32)
    leaf = load(Kms.create().issue(APP_A, app_info=info).leaf_pem)
    assert [e.oid for e in leaf.extensions] == [e.oid for e in vector("leaf-a-appinfo").extensions]
    content = _content(leaf)
    real = _content(vector("leaf-a-appinfo"))
    assert [type(field) for field in content] == [type(field) for field in real]
    same = (0, 1, 2, 3, 6)
    assert [content[i] for i in same] == [real[i] for i in same]


def _content(certificate: x509.Certificate) -> list[object]:
    value = certificate.extensions.get_extension_for_oid(certs.OID_APP_INFO).value
    assert isinstance(value, x509.UnrecognizedExtension)
    head = 3 if value.value[1] == 0x81 else 4
    found = msgspec.msgpack.decode(value.value[head:])
    assert isinstance(found, list)
    return found


def test_keys_follow_from_the_seed_and_the_app() -> None:
    one, same, other = Kms.create(b"seed"), Kms.create(b"seed"), Kms.create(b"another")
    assert _spki(one.root) == _spki(same.root) != _spki(other.root)
    first, second = one.app_ca(APP_A)[1], same.app_ca(APP_A)[1]
    assert _spki(first) == _spki(second)
    assert first != second
    assert _spki(first) != _spki(one.app_ca(APP_B)[1])
    assert one.issue(APP_A).key_pem != one.issue(APP_A).key_pem


def _spki(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_remade_root_has_the_same_key_and_still_verifies_old_leaves() -> None:
    kms = Kms.create()
    issued, before = kms.issue(APP_A), kms.root
    kms.remake_root()
    assert kms.root != before
    assert _spki(kms.root) == _spki(before)
    handshake(kms.root_pem, issued, kms.issue(APP_B))


def test_dates_are_the_ones_asked_for() -> None:
    leaf = load(
        Kms.create().issue(APP_A, not_before=1_700_000_000, not_after=1_900_000_000).leaf_pem
    )
    assert leaf.not_valid_before_utc.timestamp() == 1_700_000_000
    assert leaf.not_valid_after_utc.timestamp() == 1_900_000_000
    default = load(Kms.create().issue(APP_A).leaf_pem)
    lasting = default.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert abs(lasting - datetime.timedelta(days=3650)) < datetime.timedelta(minutes=5)


def test_dates_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError):
        Kms.create().issue(APP_A, not_before=1_900_000_000, not_after=1_700_000_000)


def test_mutual_tls_between_two_apps() -> None:
    kms = Kms.create()
    assert handshake(kms.root_pem, kms.issue(APP_A), kms.issue(APP_B))[0].startswith("TLSv1.3")


def test_another_kms_is_refused_though_its_names_are_the_same() -> None:
    kms = Kms.create()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(kms.root_pem, Kms.create().issue(APP_A), kms.issue(APP_B))


def handshake(root: bytes, server: certs.Issued, client: certs.Issued) -> tuple[str, bytes]:
    """Shake hands in memory, both sides verifying; TLS version and the server's leaf."""
    sides = []
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    for issued, purpose, read, write in (
        (server, ssl.PROTOCOL_TLS_SERVER, wires[0], wires[1]),
        (client, ssl.PROTOCOL_TLS_CLIENT, wires[1], wires[0]),
    ):
        context = ssl.SSLContext(purpose)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=root.decode())
        issued.load_into(context)
        serving = purpose == ssl.PROTOCOL_TLS_SERVER
        sides.append(context.wrap_bio(read, write, server_side=serving))
    waiting = list(sides)
    for _ in range(10):
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
        if not waiting:
            leaf = sides[1].getpeercert(binary_form=True)
            return sides[1].version() or "", leaf or b""
    raise AssertionError("the handshake did not come to an end")
