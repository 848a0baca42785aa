"""What credentials must be like before anything uses them."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.identity.conftest import (
    APP_A,
    APP_B,
    Issued,
    Kms,
    app_info_extension,
    issue,
    shake_hands,
)

from dstack_mesh.identity.snapshot import Snapshot, build_snapshot
from dstack_mesh.identity.source import SourceError
from dstack_mesh.identity.tls import Credentials
from dstack_mesh.model import Role

NOW = 1_700_000_000.0
DAY = 86_400.0


def build(credentials: Credentials, *, lifetime: float = DAY, generation: int = 1) -> Snapshot:
    return build_snapshot(
        credentials,
        generation,
        lifetime=lifetime,
        min_version=ssl.TLSVersion.TLSv1_3,
        now=NOW,
    )


def expiring(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(NOW + seconds, datetime.UTC)


def test_good_credentials_become_contexts_of_both_directions(kms: Kms) -> None:
    leaf = kms.leaf(more=[app_info_extension(APP_A)])
    snapshot = build(leaf.credentials, generation=7)
    assert (snapshot.generation, snapshot.app_id) == (7, APP_A)
    assert snapshot.root_spki == kms.root.root_spki
    assert snapshot.app_info is not None
    assert snapshot.app_info.compose_hash == "01" * 32
    server, client = shake_hands(snapshot.server_context, snapshot.client_context)
    for ssl_object, role in ((server, Role.CALLER), (client, Role.TARGET)):
        peer = snapshot.peers.identify(ssl_object, role)
        assert peer is not None
        assert peer.app_id == APP_A


def test_the_chain_may_come_without_its_root(kms: Kms) -> None:
    leaf = kms.leaf()
    snapshot = build(replace(leaf.credentials, chain_pem=leaf.chain_pem[:2]))
    assert snapshot.app_id == APP_A


@pytest.mark.parametrize(
    ("left", "lifetime", "renewal"),
    [(10 * 365 * DAY, DAY, 16 * 3600), (DAY, DAY, 16 * 3600), (3600, DAY, 2400)],
)
def test_renewal_is_due_at_two_thirds_of_what_was_asked_or_is_left(
    kms: Kms, left: float, lifetime: float, renewal: float
) -> None:
    leaf = kms.leaf(not_after=expiring(left))
    snapshot = build(leaf.credentials, lifetime=lifetime)
    assert snapshot.not_after == NOW + left
    assert snapshot.renew_at == pytest.approx(NOW + renewal)


@pytest.mark.parametrize("link", ["leaf", "app CA", "root"])
def test_the_first_link_to_expire_counts_the_root_too(link: str) -> None:
    early = {"not_after": expiring(3600)}
    from cryptography import x509

    constraints = [x509.BasicConstraints(ca=True, path_length=1)]
    kms = Kms(issue(None, "Dstack KMS CA", constraints, **(early if link == "root" else {})))
    app_ca = kms.app_ca(**(early if link == "app CA" else {}))
    leaf = kms.leaf(issuer=app_ca, **(early if link == "leaf" else {}))
    assert build(leaf.credentials).not_after == NOW + 3600


def refusal(credentials: Credentials) -> str:
    with pytest.raises(SourceError) as error:
        build(credentials)
    return error.value.detail


def test_a_chain_that_breaks_a_rule_is_refused(kms: Kms) -> None:
    assert "refused by every peer: chain rule 3: the leaf says app-id" in refusal(
        kms.leaf(APP_B, issuer=kms.app_ca(APP_A)).credentials
    )
    assert "chain rule 1: the verified chain has 2" in refusal(
        kms.leaf(issuer=kms.root).credentials
    )
    assert "chain rule 2: the leaf: no app-id" in refusal(kms.leaf(extensions=[]).credentials)


@pytest.mark.parametrize("eku", [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
def test_a_leaf_for_one_role_only_is_refused(kms: Kms, eku: ExtendedKeyUsageOID) -> None:
    assert "extended key usage lacks" in refusal(kms.leaf(eku=[eku]).credentials)


def test_an_expired_chain_is_refused(kms: Kms) -> None:
    assert "the leaf is valid from" in refusal(kms.leaf(not_after=expiring(0)).credentials)


def test_a_chain_whose_links_do_not_fit_is_refused(kms: Kms) -> None:
    leaf, other = kms.leaf(), kms.app_ca()
    mixed: Issued = replace(leaf, above=(other.cert, kms.root.cert))
    assert "the leaf is not signed by the next link" in refusal(mixed.credentials)


def test_a_chain_in_the_wrong_order_is_refused(kms: Kms) -> None:
    leaf, app_ca, root = kms.leaf().chain_pem
    for chain in ((app_ca, leaf, root), (leaf, root, app_ca), (root,), ()):
        refusal(replace(kms.leaf().credentials, chain_pem=chain, root_pem=root))


def test_a_root_of_another_kms_is_refused(kms: Kms) -> None:
    credentials = kms.leaf().credentials
    other = replace(
        credentials, chain_pem=credentials.chain_pem[:2], root_pem=Kms().root.chain_pem[0]
    )
    assert "the app CA is not signed by the next link" in refusal(other)


def test_a_key_of_another_leaf_is_refused(kms: Kms) -> None:
    credentials = replace(kms.leaf().credentials, key_pem=kms.leaf().key_pem)
    assert refusal(credentials) == "our private key is not the one of our certificate"


def test_an_encrypted_key_is_refused(kms: Kms) -> None:
    leaf = kms.leaf()
    encrypted = leaf.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    assert "is encrypted" in refusal(replace(leaf.credentials, key_pem=encrypted))


def test_what_is_no_key_is_refused_and_not_repeated(kms: Kms) -> None:
    message = refusal(replace(kms.leaf().credentials, key_pem=b"hunter2"))
    assert message == "our private key cannot be read as PEM (ValueError)"


def test_what_is_no_certificate_is_refused(kms: Kms) -> None:
    credentials = kms.leaf().credentials
    assert "cannot be parsed" in refusal(replace(credentials, root_pem=b"x"))
    assert "cannot be parsed" in refusal(replace(credentials, chain_pem=(b"x",)))


def test_what_openssl_does_not_take_is_refused(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> ssl.SSLContext:
        raise ssl.SSLError("key type not allowed here")

    monkeypatch.setattr("dstack_mesh.identity.snapshot.client_context", refusing)
    assert refusal(kms.leaf().credentials) == (
        "OpenSSL does not take our certificate or key: ('key type not allowed here',)"
    )


def test_snapshots_are_told_apart_by_identity(kms: Kms) -> None:
    credentials = kms.leaf().credentials
    assert build(credentials) != build(credentials)


def test_the_key_is_not_shown(kms: Kms) -> None:
    leaf = kms.leaf()
    assert leaf.key_pem.split(b"\n")[1].decode() not in repr(build(leaf.credentials))
