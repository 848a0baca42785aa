"""A snapshot of our own identity: credentials that were found good, ready for use."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from dstack_mesh.identity.chain import ChainRuleBroken, check_chain, spki, verify_links
from dstack_mesh.identity.peers import VerifiedPeers
from dstack_mesh.identity.source import SourceError
from dstack_mesh.identity.tls import client_context, server_context
from dstack_mesh.model import Role

if TYPE_CHECKING:
    from dstack_mesh.identity.tls import Credentials
    from dstack_mesh.model import AppId, AppInfo

RENEW_AFTER = 2 / 3
"""The share of the lifetime after which a snapshot is to be replaced."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Who we are for both directions, until replaced as a whole. Times are seconds since 1970."""

    generation: int
    """1 for the first, and one more for each that replaced it."""

    app_id: AppId
    not_after: float
    """When the first certificate of our chain expires."""

    renew_at: float
    root_spki: bytes
    """The KMS root's public key, DER SubjectPublicKeyInfo."""

    client_context: ssl.SSLContext
    server_context: ssl.SSLContext
    peers: VerifiedPeers
    app_info: AppInfo | None


def build_snapshot(
    credentials: Credentials,
    generation: int,
    *,
    lifetime: float,
    min_version: ssl.TLSVersion,
    now: float,
) -> Snapshot:
    """Validate `credentials` the way a peer will, and make the contexts of both directions.

    `lifetime` is what was asked for, in seconds; renewal is due at 2/3 of it, or of what is left
    of the chain at `now` where that is shorter. Raises `SourceError` saying what is wrong.
    """
    links = _links(credentials)
    chain = [cert.public_bytes(Encoding.DER) for cert in links]
    try:
        verify_links(chain, now)
        root_spki = spki(links[-1])
        check_chain(chain, Role.CALLER, root_spki)
        ours = check_chain(chain, Role.TARGET, root_spki)
    except ChainRuleBroken as exc:
        raise SourceError(f"our certificate would be refused by every peer: {exc}") from exc
    _check_key(credentials.key_pem, links[0])
    try:
        client = client_context(credentials, min_version)
        server = server_context(credentials, min_version)
    except ssl.SSLError as exc:
        raise SourceError(f"OpenSSL does not take our certificate or key: {exc}") from exc
    not_after = min(ours.not_after, links[-1].not_valid_after_utc.timestamp())
    return Snapshot(
        generation=generation,
        app_id=ours.app_id,
        not_after=not_after,
        renew_at=now + RENEW_AFTER * min(lifetime, not_after - now),
        root_spki=root_spki,
        client_context=client,
        server_context=server,
        peers=VerifiedPeers(root_spki),
        app_info=ours.app_info,
    )


def _links(credentials: Credentials) -> list[x509.Certificate]:
    """Return leaf, whatever is between, and the root, which the chain itself may lack."""
    try:
        root = x509.load_pem_x509_certificate(credentials.root_pem)
        links = [x509.load_pem_x509_certificate(pem) for pem in credentials.chain_pem]
    except ValueError as exc:
        raise SourceError(f"our certificate chain cannot be parsed: {exc}") from exc
    if links and links[-1].public_key() == root.public_key():
        links.pop()
    return [*links, root]


def _check_key(key_pem: bytes, leaf: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(key_pem, password=None)
    except TypeError:
        raise SourceError(
            "our private key is encrypted: give it as plain PEM, readable to this process only"
        ) from None
    except Exception as exc:  # the parser's text could quote what it parsed, so it is not repeated
        raise SourceError(f"our private key cannot be read as PEM ({type(exc).__name__})") from None
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public != spki(leaf):
        raise SourceError("our private key is not the one of our certificate")
