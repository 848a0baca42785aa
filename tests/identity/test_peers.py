"""Who stands at the other end: real handshakes, judged as the data plane has them judged."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.identity.conftest import APP_A, APP_B, CERTS, INDEX, Kms, shake_hands

from dstack_mesh.identity import tls
from dstack_mesh.identity.chain import ChainRuleBroken, spki
from dstack_mesh.identity.peers import VerifiedPeers, verified_chain
from dstack_mesh.model import Role

BOTH = pytest.mark.parametrize("role", Role)
VERSIONS = pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)

# For each class of the index: who a leaf of it is found to be (None: TLS refuses it; a number:
# the chain rule that it breaks).
_OUTCOME: dict[str, int | str | None] = {
    "ok": "its app-id",
    "foreign": None,
    "expired": None,
    "not-yet-valid": None,
    "bad-chain": None,
    "chain-ok-no-app-id": 2,
    "chain-ok-no-app-ca": 1,
    "chain-ok-app-id-mismatch": 3,
    "odd-encoding": 2,
    "app-ca": 1,
    "root": 1,
}
_CHAIN_OF_TWO = {"leaf-local-provider": 1}


def root_of_kms1() -> bytes:
    return spki(x509.load_pem_x509_certificate((CERTS / "kms1-root.pem").read_bytes()))


def ours(name: str = "leaf-b") -> tls.Credentials:
    blocks = (CERTS / f"{name}.chain.pem").read_bytes().split(b"-----BEGIN")[1:]
    chain = tuple(b"-----BEGIN" + block for block in blocks)
    return tls.Credentials((CERTS / f"{name}.key").read_bytes(), chain, chain[-1])


def impostor(name: str, protocol: int, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a context that shows a vector's chain, whatever it is, and trusts everybody."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    context.load_cert_chain(CERTS / INDEX[name]["chain"], CERTS / INDEX[name]["key"])
    return context


def meet(name: str, role: Role, version: ssl.TLSVersion) -> ssl.SSLObject:
    """Return our side's SSL object after a handshake with who shows the vector `name`."""
    if role is Role.TARGET:
        peer = impostor(name, ssl.PROTOCOL_TLS_SERVER, version)
        return shake_hands(peer, tls.client_context(ours(), version))[1]
    peer = impostor(name, ssl.PROTOCOL_TLS_CLIENT, version)
    return shake_hands(tls.server_context(ours(), version), peer)[0]


def expected(name: str, role: Role) -> int | str | None:
    vector = INDEX[name]
    wrong_role = {Role.TARGET: "leaf-a-clientonly", Role.CALLER: "leaf-a-serveronly"}[role]
    if name == wrong_role:
        return None
    if name in _CHAIN_OF_TWO:
        return _CHAIN_OF_TWO[name]
    outcome = _OUTCOME[vector["trust_under_kms1"]]
    return str(vector["app_id"]) if outcome == "its app-id" else outcome


@VERSIONS
@BOTH
@pytest.mark.parametrize("name", INDEX)
def test_each_vector_is_who_its_index_says_or_nobody(
    name: str, role: Role, version: ssl.TLSVersion
) -> None:
    outcome = expected(name, role)
    if outcome is None:
        with pytest.raises(ssl.SSLCertVerificationError):
            meet(name, role, version)
        return
    ssl_object = meet(name, role, version)
    peers = VerifiedPeers(root_of_kms1())
    for _ in range(2):  # the second answer is the remembered one
        if isinstance(outcome, int):
            with pytest.raises(ChainRuleBroken) as broken:
                peers.identify(ssl_object, role)
            assert broken.value.rule == outcome
        else:
            peer = peers.identify(ssl_object, role)
            assert peer is not None
            assert peer.app_id == outcome
            info = INDEX[name]["app_info"]
            assert (peer.app_info and peer.app_info.compose_hash) == (info and info["compose_hash"])


def test_each_vector_has_an_outcome() -> None:
    classes = {vector["trust_under_kms1"] for vector in INDEX.values()}
    assert classes == set(_OUTCOME)


def test_a_verified_chain_under_another_root_key_is_refused() -> None:
    foreign = spki(x509.load_pem_x509_certificate((CERTS / "kms2-root.pem").read_bytes()))
    with pytest.raises(ChainRuleBroken, match="chain rule 1"):
        VerifiedPeers(foreign).identify(
            meet("leaf-a", Role.TARGET, ssl.TLSVersion.TLSv1_3), Role.TARGET
        )


@VERSIONS
def test_a_caller_without_certificate_is_nobody(version: ssl.TLSVersion) -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname = False
    stranger.verify_mode = ssl.CERT_NONE
    stranger.maximum_version = version
    server, _ = shake_hands(tls.server_context(ours(), version), stranger)
    assert VerifiedPeers(root_of_kms1()).identify(server, Role.CALLER) is None


def test_a_resumed_session_is_refused_on_our_servers_side(kms: Kms) -> None:
    # A server that does resume, which `server_context` does not make.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_cert_chain(CERTS / "leaf-b.chain.pem", CERTS / "leaf-b.key")
    context.load_verify_locations(CERTS / "kms1-root.pem")
    caller = impostor("leaf-a", ssl.PROTOCOL_TLS_CLIENT, ssl.TLSVersion.TLSv1_2)
    peers = VerifiedPeers(root_of_kms1())

    server, client = shake_hands(context, caller)
    peer = peers.identify(server, Role.CALLER)
    assert peer is not None
    assert peer.app_id == APP_A

    server, _ = shake_hands(context, caller, client.session)
    assert server.session_reused
    assert server.getpeercert(binary_form=True)
    with pytest.raises(ChainRuleBroken, match="resumed"):
        peers.identify(server, Role.CALLER)


@dataclass
class FakeSsl:
    """What `VerifiedPeers` looks at, as Python 3.13 shows it."""

    chain: list[bytes]
    session_reused: bool = False
    context: object = None
    asked: list[bool] = field(default_factory=list)

    def get_verified_chain(self) -> list[bytes]:
        return self.chain

    def getpeercert(self, binary_form: bool) -> bytes | None:
        self.asked.append(binary_form)
        return self.chain[0] if self.chain else None


@dataclass
class LeafOnly(FakeSsl):
    """A certificate without a verified chain."""

    def get_verified_chain(self) -> list[bytes]:
        return []


def identify(peers: VerifiedPeers, ssl_object: Any, role: Role = Role.TARGET) -> str | None:
    peer = peers.identify(ssl_object, role)
    return peer and peer.app_id


@BOTH
def test_a_certificate_without_verified_chain_is_refused(kms: Kms, role: Role) -> None:
    peers = VerifiedPeers(kms.root.root_spki)
    with pytest.raises(ChainRuleBroken, match="no chain"):
        identify(peers, LeafOnly(kms.leaf().chain), role)


def test_a_target_without_certificate_is_refused(kms: Kms) -> None:
    with pytest.raises(ChainRuleBroken, match="no chain"):
        identify(VerifiedPeers(kms.root.root_spki), FakeSsl([]), Role.TARGET)


@BOTH
def test_a_leaf_alone_is_refused(kms: Kms, role: Role) -> None:
    with pytest.raises(ChainRuleBroken, match="has 1 cert"):
        identify(VerifiedPeers(kms.root.root_spki), FakeSsl(kms.leaf().chain[:1]), role)


def test_roles_are_not_mixed_up_in_what_is_remembered(kms: Kms) -> None:
    leaf = kms.leaf(eku=[ExtendedKeyUsageOID.SERVER_AUTH])
    peers = VerifiedPeers(kms.root.root_spki)
    assert identify(peers, FakeSsl(leaf.chain), Role.TARGET) == APP_A
    with pytest.raises(ChainRuleBroken, match="clientAuth"):
        identify(peers, FakeSsl(leaf.chain), Role.CALLER)


def test_the_whole_chain_is_what_is_remembered(kms: Kms) -> None:
    good = kms.leaf(APP_B)
    peers = VerifiedPeers(kms.root.root_spki)
    assert identify(peers, FakeSsl(good.chain)) == APP_B
    other_ca = kms.app_ca(APP_A)
    with pytest.raises(ChainRuleBroken, match="chain rule 3"):
        identify(peers, FakeSsl([good.chain[0], other_ca.chain[0], good.chain[2]]))


def test_what_is_remembered_expires(kms: Kms) -> None:
    now = [0.0]
    leaf = kms.leaf()
    expiry = leaf.cert.not_valid_after_utc.timestamp()
    peers = VerifiedPeers(kms.root.root_spki, clock=lambda: now[0])
    for now[0] in (0.0, expiry - 1):
        assert identify(peers, FakeSsl(leaf.chain)) == APP_A
    for now[0] in (expiry, expiry + 1):
        with pytest.raises(ChainRuleBroken, match="expired at 2090-01-01T00:00:00Z"):
            identify(peers, FakeSsl(leaf.chain))


def test_only_so_many_chains_are_remembered_and_the_latest_used_stay(
    kms: Kms, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstack_mesh.identity import peers as module

    judged: list[bytes] = []

    def counting(chain: list[bytes], role: Role, root_spki: bytes) -> object:
        judged.append(chain[0])
        return check_chain(chain, role, root_spki)

    check_chain = module.check_chain
    monkeypatch.setattr(module, "check_chain", counting)
    peers = VerifiedPeers(kms.root.root_spki, capacity=2)
    app_ca = kms.app_ca()
    first, second, third = (FakeSsl(kms.leaf(issuer=app_ca).chain) for _ in range(3))
    for ssl_object in (first, second, first, third, first, second):
        assert identify(peers, ssl_object) == APP_A
    assert judged == [first.chain[0], second.chain[0], third.chain[0], second.chain[0]]


def test_each_refusal_is_an_error_of_its_own(kms: Kms) -> None:
    peers = VerifiedPeers(kms.root.root_spki)
    caught = []
    for _ in range(2):
        with pytest.raises(ChainRuleBroken) as broken:
            identify(peers, FakeSsl(kms.leaf().chain[:2]))
        caught.append(broken.value)
    assert caught[0] is not caught[1]


def test_the_verified_chain_is_what_openssl_built_not_what_was_sent(
    kms: Kms, tmp_path: Path
) -> None:
    leaf, extra = kms.leaf(), kms.app_ca(APP_B)
    sent = tmp_path / "sent.pem"
    sent.write_bytes(b"".join((*leaf.chain_pem[:2], extra.chain_pem[0], leaf.key_pem)))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(sent)
    us = kms.leaf(APP_B).credentials
    _, client = shake_hands(server, tls.client_context(us, ssl.TLSVersion.TLSv1_3))
    assert verified_chain(client) == leaf.chain
