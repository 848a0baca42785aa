"""Mutations of real chains: none is believed to be another app, or an app at all, without cause."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dstack_mesh.identity import chain as rules
from dstack_mesh.identity import leaf
from dstack_mesh.model import PeerIdentity, Role
from fuzz import certificates, der
from fuzz.certificate_extension import APP_ID, APP_INFO, USAGE
from fuzz.program import Program

_NOW = 1_900_000_000.0
_TIMES = (_NOW, 0.0, 1e9, 4e9)
_USAGES = {0: b"\x04\x0aapp:custom", 1: b"\x04\x06app:ca"}
_MAX_EDITS = 12


def _root_spki() -> bytes:
    root = x509.load_der_x509_certificate(certificates.chain("leaf-a")[2])
    return root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


ROOT_SPKI = _root_spki()


def _offset(name: str, link: int, wanted: bytes) -> bytes:
    """Give where `wanted` is in a link, as an edit names places."""
    return certificates.chain(name)[link].index(wanted).to_bytes(2)


def _renamed() -> bytes:
    """Write edits that change the app-id alike in leaf and app CA."""
    edits = b""
    for link in (0, 1):
        start = int.from_bytes(_offset("leaf-a", link, b"\xaa" * 20))
        edits += b"".join(bytes((link,)) + (start + n).to_bytes(2) + b"\x11" for n in (0, 7))
    return edits


def _changed(link: int, wanted: bytes, last: int) -> bytes:
    """Write edits that change the last byte of `wanted`, wherever it is in a link of leaf-a."""
    der_bytes = certificates.chain("leaf-a")[link]
    places = [n for n in range(len(der_bytes)) if der_bytes.startswith(wanted, n)]
    return b"".join(
        bytes((link,)) + (at + len(wanted) - 1).to_bytes(2) + bytes((last,)) for at in places
    )


_CURVE = bytes.fromhex("06082a8648ce3d030107")
_SIGNATURE = bytes.fromhex("06082a8648ce3d040302")


# A base, flags, and edits: link and operation, offset (2 bytes), value.
SEEDS = (
    *(bytes((number, 0)) for number in range(len(certificates.BASES))),
    *(bytes((number, 1)) for number in (0, 8, 9)),
    *(b"\x00\x02" + _changed(link, _CURVE, 0) for link in range(3)),  # no curve that is known
    *(b"\x00\x02" + _changed(link, _SIGNATURE, 9) for link in range(3)),
    b"\x00\x00" + _changed(0, b"app:custom", 0xFF),
    b"\x00\x00" + _changed(1, b"app:ca", 0xFF),
    b"\x00\x04",
    b"\x00\x02\x00" + _offset("leaf-a", 0, b"\xaa" * 20) + b"\xbb",
    b"\x00\x00" + _renamed(),
    b"\x00\x00\x04\x00\x10\x00",
    b"\x00\x00\x08\x00\x10\x00",
    b"\x00\x00\x0c\x00\x00\x01",
    b"\x00\x00\x03\x00\x00\x00",
)


def run(data: bytes) -> None:
    program = Program(data)
    name = certificates.BASES[program.byte() % len(certificates.BASES)]
    flags = program.byte()
    role = Role.CALLER if flags & 1 else Role.TARGET
    at = _TIMES[flags >> 2 & 3]
    base = list(certificates.chain(name))
    chain = _edited(list(base), program)

    peer = _identify(chain, role)
    alone = _identify_leaf(chain[0], role, at) if chain else None
    signed = (peer is not None or bool(flags & 2)) and _holds(chain, at)
    if peer is None:
        return
    _check_rules(chain, peer)
    if alone is not None:
        assert (alone.app_id, alone.app_info) == (peer.app_id, peer.app_info)
    if signed:
        assert at < peer.not_after
        for one, other in zip(chain[:2], base[:2], strict=True):
            assert der.signed_part(one) == der.signed_part(other), "signed by nobody we know"
        assert peer.app_id == certificates.app_id(name)


def _edited(chain: list[bytes], program: Program) -> list[bytes]:
    """Change bytes, take some out, put some in; give a link another's place; drop or repeat one."""
    for _ in range(_MAX_EDITS):
        if program.left < 4:
            break
        what, offset, value = program.byte(), program.short(), program.byte()
        if not chain:
            break
        link, operation = what & 3, what >> 2 & 3
        link %= len(chain)
        der_bytes = chain[link]
        at = offset % (len(der_bytes) or 1)
        if operation == 0:
            chain[link] = der_bytes[:at] + bytes((value,)) + der_bytes[at + 1 :]
        elif operation == 1:
            chain[link] = der_bytes[:at] + der_bytes[at + 1 + value % 4 :]
        elif operation == 2:
            chain[link] = der_bytes[:at] + bytes((value,)) + der_bytes[at:]
        elif what & 3 == 3:
            chain.pop(link)
        else:
            chain.insert(link, chain[value % len(chain)])
    return chain


def _identify(chain: list[bytes], role: Role) -> PeerIdentity | None:
    try:
        return rules.check_chain(chain, role, ROOT_SPKI)
    except rules.ChainRuleBroken as broken:
        assert 1 <= broken.rule <= 5
        return None


def _identify_leaf(certificate: bytes, role: Role, at: float) -> PeerIdentity | None:
    try:
        return leaf.identify_leaf(certificate, role, at)
    except rules.ChainRuleBroken as broken:
        assert 1 <= broken.rule <= 5
        return None


def _holds(chain: list[bytes], at: float) -> bool:
    try:
        rules.verify_links(chain, at)
    except rules.ChainRuleBroken as broken:
        assert broken.rule in (1, 2, 3)
        return False
    return True


def _check_rules(chain: list[bytes], peer: PeerIdentity) -> None:
    """Read the rules' facts once more, with a reader that shares nothing with the first."""
    assert len(chain) == 3
    assert ROOT_SPKI in chain[2], "another root's key"
    for link in (0, 1):
        found = der.extensions(chain[link])
        ids = [value for oid, value in found if oid == APP_ID]
        assert ids == [b"\x04\x14" + bytes.fromhex(peer.app_id)]
        usages = [value for oid, value in found if oid == USAGE]
        assert usages in ([], [_USAGES[link]])
    infos = [value for oid, value in der.extensions(chain[0]) if oid == APP_INFO]
    assert (peer.app_info is not None) == (len(infos) == 1)
    if peer.app_info is not None:
        assert peer.app_info.app_id == peer.app_id
        assert bytes.fromhex(peer.app_id) in infos[0]
