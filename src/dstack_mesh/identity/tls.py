"""TLS contexts made from our credentials, accepting a connection, and reading its failures.

The contexts verify what OpenSSL can: signatures, dates, key usage and path lengths, up to the KMS
root alone. `VerifiedPeers` then holds the verified chain against the chain rules.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dstack_mesh.identity.peers import VerifiedPeers as VerifiedPeers

if TYPE_CHECKING:
    from collections.abc import Callable

_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)

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

_NOT_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST"}
)
_NO_COMMON_VERSION = frozenset({"UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE"})

_LINGER_SECONDS = 1.0

_MAX_UNREAD_BYTES = 1024 * 1024
"""What may wait to be sent, encrypted; writers of data stop far below it."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A private key with its chain (leaf, app CA and perhaps the root), and the KMS root. PEM."""

    key_pem: bytes = field(repr=False)
    chain_pem: tuple[bytes, ...]
    root_pem: bytes


@dataclass(slots=True)
class _Accepting:
    """An accepted connection during its handshake."""

    sock: socket.socket
    lingering: socket.socket | None = None


_accepting: ContextVar[_Accepting | None] = ContextVar("_accepting", default=None)


class _BoundedObject(ssl.SSLObject):
    """Fails where the peer has TLS itself answer it, again and again, and reads no answer.

    Each KeyUpdate may ask for one in return (RFC 8446 4.6.3), and in TLS 1.2 each attempt to
    renegotiate gets an alert. Event loops go on reading while such answers pile up.
    """

    _outgoing: ssl.MemoryBIO
    _sslobj: Any

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the base's name
        # The base's own body, so that a read costs no more than without this class.
        try:
            return self._sslobj.read(len) if buffer is None else self._sslobj.read(len, buffer)
        except ssl.SSLWantReadError:
            if self._outgoing.pending > _MAX_UNREAD_BYTES:
                raise ssl.SSLError("the peer does not read what TLS has to answer it") from None
            raise


class _Context(ssl.SSLContext):
    """Makes objects that know what waits to be sent."""

    sslobject_class: type[ssl.SSLObject] = _BoundedObject

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kw: Any
    ) -> Any:
        ssl_object = super().wrap_bio(incoming, outgoing, *args, **kw)
        ssl_object._outgoing = outgoing  # type: ignore[attr-defined]  # noqa: SLF001 - our own class
        return ssl_object


class _ServerObject(_BoundedObject):
    """Sends the alert that OpenSSL leaves behind when our side refuses a client certificate.

    asyncio and uvloop drop what a failed handshake has put into the outgoing BIO. By then what
    went before is long sent, so the alert may go straight to the socket.
    """

    _connection: _Accepting | None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            self._send_alert()
            raise
        self._connection = None

    def _send_alert(self) -> None:
        alert = self._outgoing.read()
        if self._connection is not None and alert:
            with suppress(OSError):  # the caller may be gone already
                self._connection.sock.send(alert)
                self._connection.lingering = self._connection.sock.dup()


class _ServerContext(_Context):
    """Hands the connection that `accept_tls` is accepting to the SSL object made for it."""

    sslobject_class = _ServerObject
    make_fresh: Callable[[], _ServerContext] | None = None
    """Where set, makes a context for each connection: TLS 1.2 sessions are cached by the context.

    Python's `ssl` cannot switch that cache off, and a resumed session has no chain to check
    (docs/adr/0002): with nothing shared there is nothing to resume.
    """

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **kw: Any
    ) -> Any:
        if self.make_fresh is not None:
            return self.make_fresh().wrap_bio(incoming, outgoing, *args, **kw)
        ssl_object = super().wrap_bio(incoming, outgoing, *args, **kw)
        ssl_object._connection = _accepting.get()  # noqa: SLF001 - our own class
        return ssl_object


def client_context(credentials: Credentials, min_version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the context for connections to targets, which must show a certificate.

    Raises `ssl.SSLError` when key, chain or root cannot be loaded or do not fit one another.
    """
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    # A name in a certificate means nothing in dstack: who the target is, is its app-id.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _configure(context, credentials, min_version)
    return context


def server_context(credentials: Credentials, min_version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return the context for callers, which may show a certificate (`/health` is open to all).

    Raises `ssl.SSLError` when key, chain or root cannot be loaded or do not fit one another.
    """

    def make() -> _ServerContext:
        context = _ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0
        _configure(context, credentials, min_version)
        return context

    context = make()
    if min_version < ssl.TLSVersion.TLSv1_3:
        context.make_fresh = make
    return context


def _configure(
    context: ssl.SSLContext, credentials: Credentials, min_version: ssl.TLSVersion
) -> None:
    context.minimum_version = min_version
    context.set_ciphers(_TLS12_CIPHERS)
    # No resumption: a resumed session has no chain to check (docs/adr/0002).
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
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


async def accept_tls(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    protocol_factory: Callable[[], _Protocol],
    context: ssl.SSLContext,
    handshake_timeout: float,
) -> tuple[asyncio.Transport, _Protocol]:
    """Do the server's side of TLS on `sock`, which is accepted and non-blocking.

    `context` is one of `server_context`'s. `handshake_timeout` is in seconds. Raises
    `ssl.SSLError`, or an `OSError` when the connection ends or the time is over; the socket is
    closed then, and an alert that says why our side refused has been sent.
    """
    protocol = protocol_factory()
    accepting = _Accepting(sock)
    token = _accepting.set(accepting)
    try:
        # uvloop returns its own TLS protocol in the pair, so the caller gets `protocol` instead.
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, sock, ssl=context, ssl_handshake_timeout=handshake_timeout
        )
    finally:
        _accepting.reset(token)
        if accepting.lingering is not None:
            await _linger(loop, accepting.lingering)
    return transport, protocol


async def _linger(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Read what the caller still sends until it has had time to see the alert.

    A TLS 1.3 client sends its request before it can know of the refusal. Closing with that
    unread makes the kernel reset the connection, and a reset discards the alert.
    """
    with sock, suppress(OSError, TimeoutError):
        sock.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_LINGER_SECONDS):
            while await loop.sock_recv(sock, 65536):
                pass
