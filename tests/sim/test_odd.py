"""Every impostor chain is mintable, loads, and is refused by exactly who is said to refuse it."""

from __future__ import annotations

import ssl

import pytest
from cryptography import x509

from dstack_mesh.model import AppId
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import (
    REFUSED_BY_TLS,
    WRONG_CALLERS,
    WRONG_TARGETS,
    Kind,
    impostor_chain,
)

APP = AppId("aa" * 20)
OTHER = AppId("bb" * 20)
KMS = Kms.create(b"impostor tests")


def verify(issued: certs.Issued, *, as_target: bool) -> None:
    """Let OpenSSL at security level 2 verify this chain in a handshake, in the given role."""
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    prover, verifier = (server, client) if as_target else (client, server)
    other = KMS.issue(OTHER)
    for context in (server, client):
        # The prover must be able to show a weak key at all.
        context.set_ciphers("DEFAULT:@SECLEVEL=" + ("0" if context is prover else "2"))
        context.load_verify_locations(cadata=KMS.root_pem.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    issued.load_into(prover)
    other.load_into(verifier)
    sides = [
        client.wrap_bio(wires[0], wires[1], server_side=False),
        server.wrap_bio(wires[1], wires[0], server_side=True),
    ]
    done: set[int] = set()
    while len(done) < 2:
        for number, side in enumerate(sides):
            try:
                side.do_handshake()
                done.add(number)
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("kind", WRONG_TARGETS)
def test_as_target(kind: Kind) -> None:
    issued = impostor_chain(KMS, kind, APP, OTHER)
    if kind in REFUSED_BY_TLS:
        with pytest.raises(ssl.SSLCertVerificationError):
            verify(issued, as_target=True)
    else:
        verify(issued, as_target=True)


@pytest.mark.parametrize("kind", WRONG_CALLERS)
def test_as_caller(kind: Kind) -> None:
    issued = impostor_chain(KMS, kind, APP, OTHER)
    if kind in REFUSED_BY_TLS:
        with pytest.raises(ssl.SSLCertVerificationError):
            verify(issued, as_target=False)
    else:
        verify(issued, as_target=False)


def test_every_kind_is_wrong_for_somebody() -> None:
    assert set(WRONG_TARGETS) | set(WRONG_CALLERS) == set(Kind)


def test_kind_may_be_text_and_must_exist() -> None:
    assert len(impostor_chain(KMS, "direct_root", APP, OTHER).chain_pem) == 2
    with pytest.raises(ValueError, match="no_such"):
        impostor_chain(KMS, "no_such", APP, OTHER)
    with pytest.raises(ValueError, match="two different"):
        impostor_chain(KMS, Kind.OTHER_APP, APP, APP)


def app_ids(pem: bytes) -> list[str]:
    """Hex after each occurrence of the app-id's OID and the OCTET STRING's head."""
    der = x509.load_pem_x509_certificate(pem).tbs_certificate_bytes
    marker = bytes.fromhex("060a2b0601040183e73d0103")
    return [part[2:][: part[1]].hex() for part in der.split(marker)[1:]]


@pytest.mark.parametrize(
    ("kind", "leaf", "ca"),
    [
        (Kind.OTHER_APP, ["0414" + OTHER], ["0414" + OTHER]),
        (Kind.OTHER_KMS, ["0414" + APP], ["0414" + APP]),
        (Kind.APP_CA_OF_OTHER_APP, ["0414" + APP], ["0414" + OTHER]),
        (Kind.NO_APP_ID, [], ["0414" + APP]),
        (Kind.MALFORMED_APP_ID, [APP], ["0414" + APP]),
        (Kind.LONG_APP_ID, ["0420" + APP + "00" * 12], ["0414" + APP]),
        (Kind.TRAILING_APP_ID, ["0414" + APP + "0000"], ["0414" + APP]),
        (Kind.EMPTY_APP_ID, ["0400"], ["0414" + APP]),
        (Kind.TEXT_APP_ID, ["0c28" + APP.encode().hex()], ["0414" + APP]),
        (Kind.TWO_APP_IDS, ["0414" + APP, "0414" + OTHER], ["0414" + APP]),
        (Kind.CA_WITHOUT_APP_ID, ["0414" + APP], []),
        (Kind.WRONG_CA_USAGE, ["0414" + APP], ["0414" + APP]),
    ],
)
def test_app_ids_are_what_the_kind_says(kind: Kind, leaf: list[str], ca: list[str]) -> None:
    chain = impostor_chain(KMS, kind, APP, OTHER).chain_pem
    assert app_ids(chain[0]) == leaf
    assert app_ids(chain[1]) == ca


def test_usages_are_what_the_kind_says() -> None:
    leaf = impostor_chain(KMS, Kind.WRONG_USAGE, APP, OTHER).chain_pem[0]
    assert _usage(leaf) == b"\x04\x07kms:rpc"
    ca = impostor_chain(KMS, Kind.WRONG_CA_USAGE, APP, OTHER).chain_pem[1]
    assert _usage(ca) == b"\x04\x0aapp:custom"


def _usage(pem: bytes) -> bytes:
    extensions = x509.load_pem_x509_certificate(pem).extensions
    value = extensions.get_extension_for_oid(certs.OID_USAGE).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def test_ca_leaf_and_path_length() -> None:
    leaf = impostor_chain(KMS, Kind.CA_LEAF, APP, OTHER).chain_pem[0]
    assert _constraints(leaf) == x509.BasicConstraints(ca=True, path_length=0)
    ca = impostor_chain(KMS, Kind.CA_WITHOUT_PATH_LENGTH, APP, OTHER).chain_pem[1]
    assert _constraints(ca) == x509.BasicConstraints(ca=True, path_length=None)


def _constraints(pem: bytes) -> x509.BasicConstraints:
    extensions = x509.load_pem_x509_certificate(pem).extensions
    return extensions.get_extension_for_class(x509.BasicConstraints).value
