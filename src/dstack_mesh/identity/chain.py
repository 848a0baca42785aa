"""The chain rules: what a verified chain must look like for its leaf's app-id to be believed.

TLS verifies signatures, dates, key usage and path lengths; `check_chain` holds what TLS left
standing against the rules of the contract ("Chain rules", 1 to 5). The names in the certificates
play no part: the identity is the app-id, believed because the chain ends at our KMS's root and
the app CA that signed the leaf carries the same app-id.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from dstack_mesh.identity import extension
from dstack_mesh.identity.extension import ExtensionError
from dstack_mesh.model import AppId, AppInfo, PeerIdentity, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)
_Value = TypeVar("_Value")

LINKS = 3
"""Leaf, app CA, root."""

LEAF, _APP_CA, _ROOT = "leaf", "app CA", "root"
_RULE_OF = {LEAF: 2, _APP_CA: 3, _ROOT: 1}
_EKU_OF = {
    Role.TARGET: (ExtendedKeyUsageOID.SERVER_AUTH, "serverAuth"),
    Role.CALLER: (ExtendedKeyUsageOID.CLIENT_AUTH, "clientAuth"),
}

# OpenSSL's security level 2 asks for 112 bits (NIST SP 800-57 part 1, table 2).
_MIN_RSA_BITS = 2048
_MIN_EC_BITS = 224
_MIN_DIGEST_BYTES = 28


class ChainRuleBroken(Exception):  # noqa: N818 - it names what happened, as errors.py does
    """A chain breaks a rule: `rule` is its number in the contract, `detail` what was found."""

    def __init__(self, rule: int, detail: str) -> None:
        super().__init__(rule, detail)
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"chain rule {self.rule}: {self.detail}"


def check_chain(chain: Sequence[bytes], role: Role, root_spki: bytes) -> PeerIdentity:
    """Return who the peer is, or raise `ChainRuleBroken`.

    `chain` is the chain that TLS *verified*, DER, the leaf first and the root last (not what the
    peer sent); `root_spki` our KMS root's public key as `spki` gives it.
    """
    leaf, app_ca, root = _load(chain)
    for name, cert in ((LEAF, leaf), (_APP_CA, app_ca), (_ROOT, root)):
        check_strength(name, cert)
    if spki(root) != root_spki:
        raise ChainRuleBroken(1, "the chain ends at another root key than our KMS's")
    app_id = check_leaf(leaf, role)
    _check_app_ca(app_ca, app_id)
    app_info = check_app_info(leaf, app_id)
    expiry = min(leaf.not_valid_after_utc, app_ca.not_valid_after_utc)
    return PeerIdentity(app_id, expiry.timestamp(), app_info)


def verify_links(chain: Sequence[bytes], at: float) -> None:
    """Verify what TLS would: each link signed by the next, the root by itself, dates at `at`.

    For chains that no handshake has verified (our own, a file's). `at` is in seconds since 1970.
    Raises `ChainRuleBroken` with rule 1.
    """
    certs = _load(chain)
    names = (LEAF, _APP_CA, _ROOT)
    issuers = (*certs[1:], certs[-1])
    for name, cert, issuer in zip(names, certs, issuers, strict=True):
        try:
            cert.verify_directly_issued_by(issuer)
        except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError) as exc:
            reason = str(exc) or "the signature does not fit"
            raise ChainRuleBroken(
                1, f"the {name} is not signed by the next link: {reason}"
            ) from exc
        check_dates(name, cert, at)


def spki(cert: x509.Certificate) -> bytes:
    """Return the certificate's public key as a DER SubjectPublicKeyInfo.

    Raises what `cryptography` raises for a key that it cannot read.
    """
    return cert.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _load(chain: Sequence[bytes]) -> tuple[x509.Certificate, x509.Certificate, x509.Certificate]:
    if len(chain) != LINKS:
        raise ChainRuleBroken(
            1, f"the verified chain has {len(chain)} certificate(s), expected leaf, app CA, root"
        )
    leaf, app_ca, root = chain
    return load(LEAF, leaf), load(_APP_CA, app_ca), load(_ROOT, root)


# The rules for one certificate, named by its place in the chain. `leaf.py` uses those for a leaf.


def load(name: str, der: bytes) -> x509.Certificate:
    """Parse a certificate, or raise `ChainRuleBroken`."""
    try:
        return x509.load_der_x509_certificate(der)
    except Exception as exc:  # what cannot be parsed is refused, whatever the parser raises
        raise ChainRuleBroken(_RULE_OF[name], f"the {name} cannot be parsed: {exc}") from exc


def check_dates(name: str, cert: x509.Certificate, at: float) -> None:
    """Rule 1, the dates. `at` is in seconds since 1970."""
    not_before, not_after = cert.not_valid_before_utc, cert.not_valid_after_utc
    if not not_before.timestamp() <= at < not_after.timestamp():
        raise ChainRuleBroken(
            1,
            f"the {name} is valid from {_iso(not_before)} until {_iso(not_after)}, "
            f"and now it is {_iso(datetime.fromtimestamp(at, UTC))}",
        )


def check_leaf(leaf: x509.Certificate, role: Role) -> AppId:
    """Rule 2."""
    constraints = _known(leaf, LEAF, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise ChainRuleBroken(2, "the leaf is a CA certificate")
    eku = _known(leaf, LEAF, x509.ExtendedKeyUsage)
    oid, eku_name = _EKU_OF[role]
    if eku is not None and oid not in eku:
        raise ChainRuleBroken(
            2, f"the leaf's extended key usage lacks {eku_name}, which a {role.value} needs"
        )
    _check_usage(leaf, LEAF, extension.USAGE_LEAF)
    return _read(leaf, LEAF, extension.app_id)


def _check_app_ca(app_ca: x509.Certificate, leaf_app_id: AppId) -> None:
    """Rule 3."""
    constraints = _known(app_ca, _APP_CA, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise ChainRuleBroken(3, "the app CA is not a CA certificate")
    if constraints.path_length != 0:
        raise ChainRuleBroken(
            3, f"the app CA's path length is {constraints.path_length}, expected 0"
        )
    _check_usage(app_ca, _APP_CA, extension.USAGE_APP_CA)
    app_id = _read(app_ca, _APP_CA, extension.app_id)
    if app_id != leaf_app_id:
        raise ChainRuleBroken(
            3, f"the leaf says app-id {leaf_app_id}, but the app CA that signed it {app_id}"
        )


def check_app_info(leaf: x509.Certificate, app_id: AppId) -> AppInfo | None:
    """Rule 4."""
    try:
        app_info = extension.app_info(leaf)
    except ExtensionError as exc:
        raise ChainRuleBroken(4, f"the leaf: {exc}") from exc
    if app_info is not None and app_info.app_id != app_id:
        raise ChainRuleBroken(
            4, f"the leaf says app-id {app_id}, but its app info {app_info.app_id}"
        )
    return app_info


def check_strength(name: str, cert: x509.Certificate) -> None:
    """Rule 5. A root is trusted for its key: its signature by itself proves nothing."""
    try:
        key = cert.public_key()
    except Exception as exc:  # what cannot be parsed is refused, whatever the parser raises
        raise ChainRuleBroken(5, f"the {name}'s public key cannot be read: {exc}") from exc
    strong = (
        (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS)
        or (isinstance(key, ec.EllipticCurvePublicKey) and key.key_size >= _MIN_EC_BITS)
        or isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey))
    )
    if not strong:
        bits = getattr(key, "key_size", "unknown")
        raise ChainRuleBroken(
            5, f"the {name}'s key ({type(key).__name__}, {bits} bits) is below security level 2"
        )
    if name == _ROOT:
        return
    try:
        digest = cert.signature_hash_algorithm  # None: the scheme has its digest built in (EdDSA)
    except Exception as exc:  # what is not known is refused, whatever the parser raises
        raise ChainRuleBroken(5, f"the {name}'s signature algorithm: {exc}") from exc
    if digest is not None and digest.digest_size < _MIN_DIGEST_BYTES:
        raise ChainRuleBroken(5, f"the {name} is signed with {digest.name}, below security level 2")


def _check_usage(cert: x509.Certificate, name: str, expected: str) -> None:
    usage = _read(cert, name, extension.usage)
    if usage is not None and usage != expected:
        raise ChainRuleBroken(
            _RULE_OF[name], f"the {name}'s usage is {usage!r}, expected {expected!r}"
        )


def _read(
    cert: x509.Certificate, name: str, reader: Callable[[x509.Certificate], _Value]
) -> _Value:
    try:
        return reader(cert)
    except ExtensionError as exc:
        raise ChainRuleBroken(_RULE_OF[name], f"the {name}: {exc}") from exc


def _known(cert: x509.Certificate, name: str, kind: type[_Extension]) -> _Extension | None:
    """Return a standard extension's value, None where there is none."""
    try:
        return _read(cert, name, extension.extensions).get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
