"""TLS contexts made from our credentials, and what failures of TLS mean.

The contexts verify what OpenSSL can: signatures, dates, key usage and path lengths, up to the KMS
root alone. `VerifiedPeers` then holds the verified chain against the chain rules.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dstack_mesh.identity.peers import VerifiedPeers as VerifiedPeers

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_mesh.model import PeerIdentity

_TLS12_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
"""Forward secrecy and AEAD only (RFC 9325 4.2); level 2 refuses SHA-1 and RSA under 2,048 bits."""

_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?(\w+)")
"""How OpenSSL names an alert that arrived, for example `TLSV1_ALERT_UNKNOWN_CA`."""

_CERTIFICATE_ALERTS = frozenset(
    {
        "no_certificate",
        "bad_certificate",
        "unsupported_certificate",
        "certificate_revoked",
        "certificate_expired",
        "certificate_unknown",
        "unknown_ca",
        "access_denied",
        "decrypt_error",  # two KMS roots have one name, so a foreign one shows as a bad signature
        "certificate_unobtainable",
        "bad_certificate_status_response",
        "bad_certificate_hash_value",
        "certificate_required",
    }
)

_MAX_CALLERS = 4096
"""Whose sessions may be resumed: about 4 MB of memory."""

_NOT_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"}
)
_NO_COMMON_VERSION = frozenset({"UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """A private key with its chain (leaf, app CA and perhaps the root), and the KMS root. PEM."""

    key_pem: bytes = field(repr=False)
    chain_pem: tuple[bytes, ...]
    root_pem: bytes


class ServerContext(ssl.SSLContext):
    """A server's context that knows who its callers were, so that they may resume their sessions.

    A resumed session has no chain to check (ADR 2): it is good for the identity that was verified
    in the handshake it comes from, and that is kept here, by the leaf. Tickets are sealed with the
    context's own key, so none is good for another context, or another identity of ours.
    """

    verified: dict[bytes, PeerIdentity]
    """By the SHA-256 of the leaf."""

    successor: ServerContext | None = None
    make: Callable[[], ServerContext]
    resumes = True

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kw: Any
    ) -> Any:
        """See `ssl.SSLContext`: make the session of one connection."""
        return ssl.SSLContext.wrap_bio(self._current(), incoming, outgoing, *args, **kw)

    def _current(self) -> ServerContext:
        """Give the context for the next connection.

        With more callers than are kept, a new context takes over: the tickets of the old one are
        no longer understood then, and its callers do a full handshake instead of being refused.
        """
        if not self.resumes:
            return self.make()
        latest = self.successor or self
        if len(latest.verified) >= _MAX_CALLERS:
            latest = self.successor = self.make()
        return latest


def client_context(credentials: Credentials, min_version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the context for connections to targets, which must show a certificate.

    Raises `ssl.SSLError` when key, chain or root cannot be loaded or do not fit one another.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A name in a certificate means nothing in dstack: who the target is, is its app-id.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _configure(context, credentials, min_version)
    return context


def server_context(credentials: Credentials, min_version: ssl.TLSVersion) -> ServerContext:
    """Return the context for callers, which may show a certificate (`/health` is open to all).

    Raises `ssl.SSLError` when key, chain or root cannot be loaded or do not fit one another.
    """

    # OpenSSL remembers TLS 1.2 sessions by their id, and Python's `ssl` has no switch for that:
    # with a context for each connection there is nothing to resume.
    resumes = min_version >= ssl.TLSVersion.TLSv1_3

    def make() -> ServerContext:
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        _configure(context, credentials, min_version)
        context.num_tickets = 1 if resumes else 0
        context.verified = {}
        context.make = make
        context.resumes = resumes
        if resumes:
            context.options &= ~ssl.OP_NO_TICKET
        return context

    return make()


def _configure(
    context: ssl.SSLContext, credentials: Credentials, min_version: ssl.TLSVersion
) -> None:
    context.minimum_version = min_version
    context.set_ciphers(_TLS12_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # Tickets: those of TLS 1.3 alone, and only where it is known what may be resumed (ADR 2).
    context.options |= ssl.OP_NO_TICKET
    # dstack's chains carry no key identifiers, which RFC 5280's strict mode asks for; and trust
    # begins at the root only, never at a link of the chain.
    context.verify_flags &= ~(ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN)
    # Only the root: all app CAs have one name, so with our own loaded other apps would fail.
    context.load_verify_locations(cadata=credentials.root_pem.decode("ascii"))
    _load_key(context, credentials)


def _load_key(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Load key and chain from memory: `ssl` reads them from a file, which must not be on a disk."""
    fd = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(b"\n".join((*credentials.chain_pem[:2], credentials.key_pem)))
        # An empty password keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
    finally:
        os.close(fd)


def refused_our_certificate(exc: BaseException) -> bool:
    """Tell whether `exc` is an alert about our certificate, whenever it arrived (RFC 8446 6.2)."""
    return _alert(exc) in _CERTIFICATE_ALERTS


def describe_tls_failure(exc: BaseException) -> str:
    """Return, for an error's `detail`, why there is no TLS session (or no longer)."""
    alert = _alert(exc)
    if alert in _CERTIFICATE_ALERTS:
        return f"the peer refused our certificate (alert {alert})"
    if alert is not None:
        return f"the peer sent the alert {alert}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not trusted: {exc.verify_message}"
    reason = getattr(exc, "reason", None)  # an SSLError's, where OpenSSL gave one
    if reason in _NOT_TLS:
        return "the peer does not speak TLS"
    if reason in _NO_COMMON_VERSION:
        return "the peer has no TLS version in common with us"
    if isinstance(exc, ConnectionAbortedError | TimeoutError):  # asyncio's handshake timeout
        return "the TLS handshake took too long"
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError | EOFError):
        return "the peer ended the connection during the TLS handshake"
    return f"TLS failed: {exc}" if str(exc) else f"TLS failed: {type(exc).__name__}"


def _alert(exc: BaseException) -> str | None:
    """Return the name of the alert that `exc` reports, as RFC 8446 spells it, if it does."""
    match = _ALERT.fullmatch(getattr(exc, "reason", None) or "")
    return match[1].lower() if match else None
