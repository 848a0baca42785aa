"""A KMS in memory: the root CA, one CA per app, and leaves as a guest agent hands them out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dstack_mesh.sim import certificates as certs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509

    from dstack_mesh.model import AppId, AppInfo
    from dstack_mesh.sim.certificates import Extension, Issued

ROOT_NAME = certs.ca_name("Dstack KMS CA")
APP_CA_NAME = certs.ca_name("Dstack App CA")
"""One name for every app's CA: a verifier that goes by names mixes them up."""

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


class Kms:
    """A root of trust. Keys follow from the seed, so one seed is one KMS however often made."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self.root_key = self._p256("root")
        self.root = self._make_root()

    @classmethod
    def create(cls, seed: bytes | None = None) -> Kms:
        """Make a KMS from `seed` (any length), or one that there never was before."""
        return cls(os.urandom(32) if seed is None else seed)

    @property
    def root_pem(self) -> bytes:
        """The root certificate as it is now."""
        return certs.certificate_pem(self.root)

    def remake_root(self) -> None:
        """Make the root certificate again with the same key, as a restarted KMS does."""
        self.root = self._make_root()

    def secret(self, label: str, size: int = 32) -> bytes:
        """`size` bytes that follow from the seed and `label` (HKDF-SHA256, RFC 5869)."""
        return HKDF(hashes.SHA256(), size, b"dstack-mesh simulator", label.encode()).derive(
            self._seed
        )

    def app_ca(self, app_id: AppId) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """The app's CA: always the same key, a new certificate for it each time."""
        key = self._p256(f"app-ca/{app_id}")
        certificate = certs.build(
            APP_CA_NAME,
            ROOT_NAME,
            key,
            self.root_key,
            [
                *certs.ca_extensions(key, 0),
                certs.app_id_extension(app_id),
                certs.usage_extension("app:ca"),
            ],
            not_after=certs.in_ten_years(),
        )
        return key, certificate

    def issue(
        self,
        app_id: AppId,
        *,
        subject: str = "localhost",
        alt_names: Sequence[str] = (),
        server_auth: bool = True,
        client_auth: bool = True,
        not_before: int = certs.NOT_BEFORE,
        not_after: int | None = None,
        app_info: AppInfo | None = None,
        attestation: bytes | None = None,
    ) -> Issued:
        """Issue a leaf with a new key: `[leaf, app CA, root]`.

        Times are seconds since 1970, `not_after` ten years from now if not given. Raises
        `ValueError` where the dates are the wrong way round.
        """
        ca_key, ca = self.app_ca(app_id)
        extensions = certs.leaf_extensions(
            alt_names, server_auth=server_auth, client_auth=client_auth
        )
        extensions.append(certs.app_id_extension(app_id))
        if app_info is not None:
            extensions.append(certs.app_info_extension(app_info))
        extensions.append(certs.usage_extension("app:custom"))
        if attestation is not None:
            extensions.append(certs.custom(certs.OID_ATTESTATION, attestation))
        return self.sign_leaf(
            APP_CA_NAME,
            ca_key,
            extensions,
            (ca, self.root),
            subject=subject,
            not_before=not_before,
            not_after=not_after,
        )

    def issue_local(
        self,
        *,
        subject: str = "localhost",
        alt_names: Sequence[str] = (),
        server_auth: bool = True,
        client_auth: bool = True,
        not_before: int = certs.NOT_BEFORE,
        not_after: int | None = None,
    ) -> Issued:
        """What a CVM with a local key provider gets: `[leaf, CA]`, and no app-id in the leaf."""
        extensions = certs.leaf_extensions(
            alt_names, server_auth=server_auth, client_auth=client_auth
        )
        extensions.append(certs.usage_extension("app:custom"))
        return self.sign_leaf(
            ROOT_NAME,
            self.root_key,
            extensions,
            (self.root,),
            subject=subject,
            not_before=not_before,
            not_after=not_after,
        )

    def sign_leaf(
        self,
        issuer: x509.Name,
        issuer_key: certs.PrivateKey,
        extensions: Sequence[Extension],
        above: Sequence[x509.Certificate],
        *,
        subject: str = "localhost",
        key: certs.PrivateKey | None = None,
        not_before: int = certs.NOT_BEFORE,
        not_after: int | None = None,
    ) -> Issued:
        """Sign any leaf and put it before the certificates `above`; no rule is checked."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        leaf = certs.build(
            certs.leaf_name(subject),
            issuer,
            key,
            issuer_key,
            extensions,
            not_before=not_before,
            not_after=certs.in_ten_years() if not_after is None else not_after,
        )
        chain = tuple(certs.certificate_pem(certificate) for certificate in (leaf, *above))
        return certs.Issued(certs.key_pem(key), chain)

    def _make_root(self) -> x509.Certificate:
        return certs.build(
            ROOT_NAME,
            ROOT_NAME,
            self.root_key,
            self.root_key,
            certs.ca_extensions(self.root_key, 1),
            not_after=certs.in_ten_years(),
        )

    def _p256(self, label: str) -> ec.EllipticCurvePrivateKey:
        # 16 bytes more than the order has, so that the remainder is evenly spread (FIPS 186-5 A.4).
        number = int.from_bytes(self.secret(label, 48), "big")
        return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())
