"""Good chains changed one bit at a time: never another app, and with the old signature nobody.

The judges are the ones that the sidecar has: OpenSSL in a handshake made by hand (TLS 1.3, in
memory, with our own contexts), then `VerifiedPeers`. What is signed again was signed by the key
that should have signed it, so it is what a careless or a bought KMS might issue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.identity.chain import ChainRuleBroken, check_chain, verify_links
from dstack_mesh.identity.peers import VerifiedPeers
from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.model import AppId, AppInfo, PeerIdentity, Role
from dstack_mesh.sim.kms import Kms
from tests.identities import snapshot_of
from tests.tls import der
from tests.tls.records import MemoryChannel
from tests.tls.tls13 import AlertReceived, Client, Ended, Server, Shown

APP = AppId("aa" * 20)
OTHER = AppId("bb" * 20)
INFO = AppInfo(APP, "11" * 32, "22" * 20, "33" * 32, "44" * 32)
ROLES = pytest.mark.parametrize("role", Role)
LINKS = ["leaf", "app CA"]


@dataclass
class Ground:
    """A KMS, our own identity under it, and a good chain of another app."""

    kms: Kms
    ours: Snapshot
    good: Shown


@pytest.fixture(scope="module")
def ground() -> Ground:
    kms = Kms.create(b"mutations")
    return Ground(kms, snapshot_of(kms, OTHER), Shown.of(kms.issue(APP, app_info=INFO)))


def judge_by_handshake(ground: Ground, shown: Shown, role: Role) -> PeerIdentity | None:
    """Show a chain to our context, with the right key; give who it is, or None for nobody."""
    ours = ground.ours
    context = ours.server_context if role is Role.CALLER else ours.client_context
    channel = MemoryChannel(context, server_side=role is Role.CALLER)
    try:
        if role is Role.CALLER:
            client = Client(channel)
            client.hello()
            client.read_flight()
            client.show(shown)
        else:
            server = Server(channel)
            server.read_client_hello()
            server.agree()
            server.show(server.flight(shown))
    except (AlertReceived, Ended):
        assert channel.failure is not None
    if channel.failure is not None:
        return None
    assert channel.done
    try:
        return VerifiedPeers(ours.root_spki).identify(channel.ours, role)
    except ChainRuleBroken:
        return None


def judge_by_rules(ground: Ground, shown: Shown, role: Role) -> PeerIdentity | None:
    """The same, without OpenSSL: our own reading of signatures, dates and rules."""
    try:
        verify_links(shown.certificates, time.time())
        return check_chain(shown.certificates, role, ground.ours.root_spki)
    except ChainRuleBroken:
        return None


def replaced(ground: Ground, link: str, certificate: bytes) -> Shown:
    chain = list(ground.good.certificates)
    chain[LINKS.index(link)] = certificate
    return Shown(tuple(chain), ground.good.key)


def signer(ground: Ground, link: str) -> ec.EllipticCurvePrivateKey:
    return ground.kms.app_ca(APP)[0] if link == "leaf" else ground.kms.root_key


def flips(where: range) -> Iterator[tuple[int, int]]:
    """Every bit of every byte."""
    return ((at, 1 << bit) for at in where for bit in range(8))


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def some_flips(where: range) -> Iterator[tuple[int, int]]:
    """Every byte, one of its bits in turn and all of them."""
    return ((at, mask) for at in where for mask in (1 << at % 8, 0xFF))


def signed_again(
    ground: Ground, link: str, patterns: Callable[[range], Iterator[tuple[int, int]]]
) -> Iterator[tuple[str, Shown]]:
    """Bytes of a link's extensions flipped, and signed again by its own issuer."""
    tbs = der.tbs_of(ground.good.certificates[LINKS.index(link)])
    extensions = der.extensions_of(tbs)
    key = signer(ground, link)
    for at, mask in patterns(range(extensions.start, extensions.end)):
        changed = der.sign(flipped(tbs, at, mask), key)
        yield f"{link}, byte {at - extensions.start}, {mask:#x}", replaced(ground, link, changed)


Judge = Callable[[Ground, Shown, Role], PeerIdentity | None]
JUDGES: dict[str, Judge] = {"OpenSSL": judge_by_handshake, "our own": judge_by_rules}


@ROLES
@pytest.mark.parametrize("judge", JUDGES)
def test_the_control(ground: Ground, role: Role, judge: str) -> None:
    """The unchanged chain, and one that is just signed again, are who they are."""
    for link in LINKS:
        tbs = der.tbs_of(ground.good.certificates[LINKS.index(link)])
        again = replaced(ground, link, der.sign(tbs, signer(ground, link)))
        for shown in (ground.good, again):
            found = JUDGES[judge](ground, shown, role)
            assert found is not None
            assert (found.app_id, found.app_info) == (APP, INFO)


@ROLES
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("judge", JUDGES)
def test_a_flipped_extension_signed_again_is_never_another_app(
    ground: Ground, judge: str, link: str, role: Role
) -> None:
    """Many are nobody; what is left is the app whose CA signed it."""
    nobody = somebody = 0
    patterns = some_flips if judge == "OpenSSL" else flips  # a handshake takes milliseconds
    for name, shown in signed_again(ground, link, patterns):
        found = JUDGES[judge](ground, shown, role)
        if found is None:
            nobody += 1
            continue
        somebody += 1
        if judge == "OpenSSL":  # two readers, one identity
            assert judge_by_rules(ground, shown, role) in (None, found), name
        assert found.app_id == APP, name
        assert found.app_info is None or found.app_info.app_id == APP, name
    assert nobody > 150
    assert somebody > 30


@ROLES
@pytest.mark.parametrize("link", LINKS)
def test_a_flipped_app_id_is_nobody(ground: Ground, link: str, role: Role) -> None:
    """Every bit of the app-id in its place: leaf and app CA then name two different apps."""
    at = LINKS.index(link)
    tbs = der.tbs_of(ground.good.certificates[at])
    value = tbs.index(b"\x04\x16\x04\x14" + bytes.fromhex(APP)) + 4
    for place, mask in flips(range(value, value + 20)):
        shown = replaced(ground, link, der.sign(flipped(tbs, place, mask), signer(ground, link)))
        assert judge_by_handshake(ground, shown, role) is None
        assert judge_by_rules(ground, shown, role) is None


@ROLES
def test_an_app_id_flipped_in_both_is_the_one_that_the_kms_signed(
    ground: Ground, role: Role
) -> None:
    """The control of the above: where both links say the other app, it is the other app."""
    chain = []
    for link in LINKS:
        tbs = der.tbs_of(ground.good.certificates[LINKS.index(link)])
        changed = tbs.replace(bytes.fromhex(APP), bytes.fromhex(OTHER))
        chain.append(der.sign(changed, signer(ground, link)))
    shown = Shown((*chain, ground.good.certificates[2]), ground.good.key)
    for judge in JUDGES.values():
        found = judge(ground, shown, role)
        assert found is not None
        assert found.app_id == OTHER


@ROLES
@pytest.mark.parametrize("link", LINKS)
def test_a_byte_flipped_anywhere_and_not_signed_again_is_nobody(
    ground: Ground, link: str, role: Role
) -> None:
    """Names, dates, keys, algorithms, the signature itself: every byte of the certificate."""
    certificate = ground.good.certificates[LINKS.index(link)]
    for at in range(len(certificate)):
        shown = replaced(ground, link, flipped(certificate, at, 1 << at % 8))
        assert judge_by_handshake(ground, shown, role) is None, at


@pytest.mark.parametrize("link", LINKS)
def test_a_bit_flipped_anywhere_is_nobody_to_our_own_reading(ground: Ground, link: str) -> None:
    """But for the count of a signature's unused bits, which OpenSSL minds: it changes nothing."""
    certificate = ground.good.certificates[LINKS.index(link)]
    *_, signature = der.children(certificate, der.element(certificate))
    for at, mask in flips(range(len(certificate))):
        if at == signature.content:
            continue
        shown = replaced(ground, link, flipped(certificate, at, mask))
        assert judge_by_rules(ground, shown, Role.TARGET) is None, at


@ROLES
def test_the_root_may_be_changed_by_no_bit_that_matters(ground: Ground, role: Role) -> None:
    """Trust is in the root that we have: what a peer sends in its place is not looked at."""
    root = ground.good.certificates[2]
    for at in range(0, len(root), 5):
        shown = Shown((*ground.good.certificates[:2], flipped(root, at, 0x10)), ground.good.key)
        found = judge_by_handshake(ground, shown, role)
        assert found is None or found.app_id == APP


@ROLES
def test_lengths_in_the_extensions_that_lie_are_nobody_or_the_app(
    ground: Ground, role: Role
) -> None:
    """Bytes put in or taken out at every place, the outer lengths made to fit, signed again."""
    for link in LINKS:
        tbs = der.tbs_of(ground.good.certificates[LINKS.index(link)])
        parts = list(der.children(tbs, der.element(tbs)))
        outer = der.extensions_of(tbs)
        block = tbs[der.element(tbs, outer.content).content : outer.end]
        before = tbs[parts[0].start : outer.start]
        for at in range(len(block)):
            changed = block[:at] + (b"\0" + block[at:] if at % 2 else block[at + 1 :])
            inner = der.wrap(der.EXTENSIONS, der.wrap(0x30, changed))
            again = der.sign(der.wrap(0x30, before + inner), signer(ground, link))
            found = judge_by_handshake(ground, replaced(ground, link, again), role)
            assert found is None or found.app_id == APP
