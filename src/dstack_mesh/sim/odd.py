"""Chains of peers that are not what they say, one for each way of being wrong.

For tests that show how little an impostor gets. Each chain is minted by whoever could mint it:
the KMS itself, the holder of an app CA's key, the holder of a leaf's key, or a stranger.
"""

from __future__ import annotations

import hashlib
import time
from enum import StrEnum
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dstack_mesh.model import AppInfo
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.kms import APP_CA_NAME, ROOT_NAME, Kms

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_mesh.model import AppId
    from dstack_mesh.sim.certificates import Extension, Issued


class Kind(StrEnum):
    """A way of being wrong for a peer that should be `app_id`."""

    OTHER_APP = "other_app"
    """A valid member of the mesh, but another app."""
    OTHER_KMS = "other_kms"
    """The right app-id, under a KMS of the impostor's own."""
    SELF_SIGNED = "self_signed"
    APP_CA_OF_OTHER_APP = "app_ca_of_other_app"
    """The leaf says `app_id`, and it is the CA of the other app that signed it."""
    LEAF_AS_CA = "leaf_as_ca"
    """Signed with the key of a good leaf of `app_id`, which is no CA."""
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    NO_APP_ID = "no_app_id"
    MALFORMED_APP_ID = "malformed_app_id"
    """The 20 bytes without the OCTET STRING around them."""
    LONG_APP_ID = "long_app_id"
    """32 bytes that begin with the right 20."""
    TRAILING_APP_ID = "trailing_app_id"
    """The right value, and two bytes after it."""
    EMPTY_APP_ID = "empty_app_id"
    TEXT_APP_ID = "text_app_id"
    """The 40 hex digits as a UTF8String."""
    TWO_APP_IDS = "two_app_ids"
    """The right extension, and one more with the other app-id."""
    WRONG_USAGE = "wrong_usage"
    """The leaf is for `kms:rpc`."""
    DIRECT_ROOT = "direct_root"
    """Signed by the KMS root, no app CA between."""
    WRONG_CA_USAGE = "wrong_ca_usage"
    """The app CA is for `app:custom`."""
    CA_WITHOUT_APP_ID = "ca_without_app_id"
    CA_WITHOUT_PATH_LENGTH = "ca_without_path_length"
    SUB_CA = "sub_ca"
    """One CA more than there may be, between the app CA and the leaf."""
    CA_LEAF = "ca_leaf"
    """The leaf is a CA."""
    APP_INFO_MISMATCH = "app_info_mismatch"
    """The leaf's app info names the other app."""
    APP_INFO_MALFORMED = "app_info_malformed"
    WEAK_KEY = "weak_key"
    """RSA with 1,024 bits."""
    CLIENT_ONLY_EKU = "client_only_eku"
    """Wrong for a target."""
    SERVER_ONLY_EKU = "server_only_eku"
    """Wrong for a caller."""


WRONG_TARGETS = tuple(kind for kind in Kind if kind is not Kind.SERVER_ONLY_EKU)
"""What a target must not be."""

WRONG_CALLERS = tuple(kind for kind in Kind if kind not in {Kind.CLIENT_ONLY_EKU, Kind.OTHER_APP})
"""What a caller must not be (another app may call, as far as its certificate goes)."""

REFUSED_BY_TLS = frozenset(
    {
        Kind.OTHER_KMS,
        Kind.SELF_SIGNED,
        Kind.LEAF_AS_CA,
        Kind.EXPIRED,
        Kind.NOT_YET_VALID,
        Kind.SUB_CA,
        Kind.WEAK_KEY,
        Kind.CLIENT_ONLY_EKU,
        Kind.SERVER_ONLY_EKU,
    }
)
"""What OpenSSL refuses by itself in the handshake (security level 2, in the role it is wrong for).

The rest verifies, and only the chain rules tell.
"""


def impostor_chain(kms: Kms, kind: Kind | str, app_id: AppId, other_app_id: AppId) -> Issued:
    """Mint the chain of a peer that should be `app_id` under `kms` and is not, in the way `kind`.

    Raises `ValueError` for a kind there is not, or two app-ids that are one.
    """
    if app_id == other_app_id:
        raise ValueError(f"app_id and other_app_id are both {app_id}: give two different ones")
    return _MINTS[Kind(kind)](_Plan(kms, app_id, other_app_id))


class _Plan:
    """Who is impersonated, and the parts of a chain that more than one kind needs."""

    def __init__(self, kms: Kms, app_id: AppId, other: AppId) -> None:
        self.kms, self.app_id, self.other = kms, app_id, other
        self.good_id = certs.app_id_extension(app_id)

    def leaf(
        self,
        *app_ids: Extension,
        usage: str = "app:custom",
        ca_of: AppId | None = None,
        before: tuple[Extension, ...] | None = None,
        key: certs.PrivateKey | None = None,
    ) -> Issued:
        """Mint a leaf under an app CA, with these app-id (and other) extensions."""
        ca_key, ca = self.kms.app_ca(ca_of or self.app_id)
        plain = certs.leaf_extensions((), server_auth=True, client_auth=True)
        extensions = [*(plain if before is None else before), *app_ids]
        extensions.append(certs.usage_extension(usage))
        above = (ca, self.kms.root)
        return self.kms.sign_leaf(APP_CA_NAME, ca_key, extensions, above, key=key)

    def raw_app_id(self, value: bytes) -> Issued:
        """Mint a leaf whose app-id extension holds just these bytes."""
        return self.leaf((x509.UnrecognizedExtension(certs.OID_APP_ID, value), False))

    def under_ca(self, *extensions: Extension, path_length: int | None = 0) -> Issued:
        """Mint a good leaf under an app CA that the KMS got wrong."""
        key = ec.generate_private_key(ec.SECP256R1())
        ca = certs.build(
            APP_CA_NAME,
            ROOT_NAME,
            key,
            self.kms.root_key,
            [*certs.ca_extensions(key, path_length), *extensions],
            not_after=certs.in_ten_years(),
        )
        above = (ca, self.kms.root)
        return self.kms.sign_leaf(APP_CA_NAME, key, self.good_leaf_extensions(), above)

    def good_leaf_extensions(self) -> list[Extension]:
        """Just what a good leaf of the app has."""
        plain = certs.leaf_extensions((), server_auth=True, client_auth=True)
        return [*plain, self.good_id, certs.usage_extension("app:custom")]


def _self_signed(plan: _Plan) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    name = certs.leaf_name("localhost")
    return plan.kms.sign_leaf(name, key, plan.good_leaf_extensions(), (), key=key)


def _leaf_as_ca(plan: _Plan) -> Issued:
    good = plan.kms.issue(plan.app_id)
    key = serialization.load_pem_private_key(good.key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("a leaf's key is on P-256")
    above = tuple(x509.load_pem_x509_certificate(pem) for pem in good.chain_pem)
    return plan.kms.sign_leaf(above[0].subject, key, plan.good_leaf_extensions(), above)


def _direct_root(plan: _Plan) -> Issued:
    kms = plan.kms
    return kms.sign_leaf(ROOT_NAME, kms.root_key, plan.good_leaf_extensions(), (kms.root,))


def _sub_ca(plan: _Plan) -> Issued:
    ca_key, ca = plan.kms.app_ca(plan.app_id)
    key = ec.generate_private_key(ec.SECP256R1())
    extensions = [*certs.ca_extensions(key, 0), plan.good_id, certs.usage_extension("app:ca")]
    sub = certs.build(
        APP_CA_NAME, APP_CA_NAME, key, ca_key, extensions, not_after=certs.in_ten_years()
    )
    above = (sub, ca, plan.kms.root)
    return plan.kms.sign_leaf(APP_CA_NAME, key, plan.good_leaf_extensions(), above)


def _ca_leaf(plan: _Plan) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    return plan.leaf(plan.good_id, before=tuple(certs.ca_extensions(key, 0)), key=key)


def _two_app_ids(plan: _Plan) -> Issued:
    """No library signs an extension twice: sign it under another OID, rename, sign again."""
    # A private OID of just as many bytes as the app-id's, which differs in the last one.
    stand_in = x509.ObjectIdentifier(certs.OID_APP_ID.dotted_string[:-1] + "7")
    issued = plan.leaf(plan.good_id, certs.custom(stand_in, bytes.fromhex(plan.other)))
    leaf = x509.load_pem_x509_certificate(issued.leaf_pem)
    renamed = leaf.tbs_certificate_bytes.replace(_oid_der(stand_in), _oid_der(certs.OID_APP_ID))
    ca_key, _ = plan.kms.app_ca(plan.app_id)
    signature = ca_key.sign(renamed, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    bits = b"\x03" + _der_length(len(signature) + 1) + b"\x00" + signature
    body = renamed + algorithm + bits
    twice = x509.load_der_x509_certificate(b"\x30" + _der_length(len(body)) + body)
    return certs.Issued(issued.key_pem, (certs.certificate_pem(twice), *issued.chain_pem[1:]))


def _oid_der(oid: x509.ObjectIdentifier) -> bytes:
    # Everything up to the last arc is the same; that one is below 128, so one byte.
    last = int(oid.dotted_string.rsplit(".", 1)[1])
    return bytes.fromhex("060a2b0601040183e73d01") + bytes((last,))


def _der_length(size: int) -> bytes:
    return certs.octet_string(bytes(size))[1:-size]


def _app_info_mismatch(plan: _Plan) -> Issued:
    def digest(label: bytes) -> str:
        return hashlib.sha256(label).hexdigest()

    info = AppInfo(plan.other, digest(b"compose"), "22" * 20, digest(b"device"), digest(b"os"))
    return plan.kms.issue(plan.app_id, app_info=info)


_MINTS: dict[Kind, Callable[[_Plan], Issued]] = {
    Kind.OTHER_APP: lambda p: p.kms.issue(p.other),
    Kind.OTHER_KMS: lambda p: Kms.create().issue(p.app_id),
    Kind.SELF_SIGNED: _self_signed,
    Kind.APP_CA_OF_OTHER_APP: lambda p: p.leaf(p.good_id, ca_of=p.other),
    Kind.LEAF_AS_CA: _leaf_as_ca,
    Kind.EXPIRED: lambda p: p.kms.issue(p.app_id, not_after=1_577_836_800),
    Kind.NOT_YET_VALID: lambda p: p.kms.issue(p.app_id, not_before=int(time.time()) + 86_400),
    Kind.NO_APP_ID: lambda p: p.leaf(),
    Kind.MALFORMED_APP_ID: lambda p: p.raw_app_id(bytes.fromhex(p.app_id)),
    Kind.LONG_APP_ID: lambda p: p.raw_app_id(b"\x04\x20" + bytes.fromhex(p.app_id) + bytes(12)),
    Kind.TRAILING_APP_ID: lambda p: p.raw_app_id(b"\x04\x14" + bytes.fromhex(p.app_id) + b"\0\0"),
    Kind.EMPTY_APP_ID: lambda p: p.raw_app_id(b"\x04\x00"),
    Kind.TEXT_APP_ID: lambda p: p.raw_app_id(b"\x0c\x28" + p.app_id.encode()),
    Kind.TWO_APP_IDS: _two_app_ids,
    Kind.WRONG_USAGE: lambda p: p.leaf(p.good_id, usage="kms:rpc"),
    Kind.DIRECT_ROOT: _direct_root,
    Kind.WRONG_CA_USAGE: lambda p: p.under_ca(p.good_id, certs.usage_extension("app:custom")),
    Kind.CA_WITHOUT_APP_ID: lambda p: p.under_ca(certs.usage_extension("app:ca")),
    Kind.CA_WITHOUT_PATH_LENGTH: lambda p: p.under_ca(
        p.good_id, certs.usage_extension("app:ca"), path_length=None
    ),
    Kind.SUB_CA: _sub_ca,
    Kind.CA_LEAF: _ca_leaf,
    Kind.APP_INFO_MISMATCH: _app_info_mismatch,
    Kind.APP_INFO_MALFORMED: lambda p: p.leaf(
        p.good_id, certs.custom(certs.OID_APP_INFO, b"\x99not MessagePack")
    ),
    Kind.WEAK_KEY: lambda p: p.leaf(
        p.good_id,
        key=rsa.generate_private_key(65_537, 1024),  # noqa: S505 - its weakness is the point
    ),
    Kind.CLIENT_ONLY_EKU: lambda p: p.kms.issue(p.app_id, server_auth=False),
    Kind.SERVER_ONLY_EKU: lambda p: p.kms.issue(p.app_id, client_auth=False),
}
