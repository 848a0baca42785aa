"""From an endpoint to a connection on which the target has proved who it is."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

from dstack_mesh.errors import (
    ConnectFailed,
    ConnectTimeout,
    MeshError,
    PeerAppIdMismatch,
    PeerRejectedUs,
    PeerUntrusted,
    TlsFailed,
    UpstreamClosed,
)
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.store import IdentityStore, Snapshot
from dstack_mesh.identity.tls import describe_tls_failure, refused_our_certificate
from dstack_mesh.model import PeerIdentity, Role
from dstack_mesh.outbound.sessions import KnownSession, KnownSessions
from dstack_mesh.outbound.target import Endpoint
from dstack_mesh.relay.dial import open_socket, reason
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.tls_client import open_tls
from dstack_mesh.relay.upstream import Connector, Upstream
from dstack_mesh.relay.worker import Worker

OpenTls = Callable[
    [Worker, socket.socket, Upstream, ssl.SSLContext, str | None, ssl.SSLSession | None],
    Awaitable[object],
]
"""What `relay.tls_client.open_tls` is, and what tests put in its place."""


class MeshConnector(Connector):
    """Opens connections to one endpoint, and hands out none whose target is not verified."""

    def __init__(
        self,
        endpoint: Endpoint,
        identity: IdentityStore,
        connect_timeout: float,
        gateway_failed: Callable[[], None],
        count_handshake: Callable[[str], None],
        open_tls: OpenTls = open_tls,
    ) -> None:
        """`gateway_failed` is called when the gateway's address could not be reached.

        `count_handshake` is called with `ok`, or with the error's code, for each TLS handshake.
        """
        self._endpoint = endpoint
        self._identity = identity
        self._timeout = connect_timeout
        self._gateway_failed = gateway_failed
        self._count_handshake = count_handshake
        self._open_tls = open_tls
        self._sessions = KnownSessions()

    async def connect(self, lane: Lane) -> Upstream:
        """See `Connector`."""
        snapshot = self._identity.require()
        stage = "the TCP connection"
        try:
            async with asyncio.timeout(self._timeout):
                sock = await self._tcp(lane)
                stage = "the TLS handshake"
                known = self._sessions.offer(snapshot.generation)
                upstream = await self._tls(lane, snapshot, sock, known)
                peer = self._verify(snapshot, upstream, known)
        except TimeoutError:
            if stage == "the TCP connection":
                self._gateway_failed()
            else:
                self._count_handshake(ConnectTimeout.code)
            raise ConnectTimeout(
                f"{stage} with {self._name()} did not finish within {self._timeout:g} s "
                "(MESH_CONNECT_TIMEOUT)"
            ) from None
        except (PeerUntrusted, PeerAppIdMismatch, PeerRejectedUs, TlsFailed) as error:
            self._sessions.clear()
            self._count_handshake(error.code)
            raise
        self._count_handshake("ok")
        upstream.admit(peer, snapshot.generation)
        self._sessions.opened(upstream, known)
        return upstream

    def forgotten(self, upstream: Upstream) -> None:
        """See `Connector`."""
        self._sessions.ended(upstream)

    def lost(self, exc: Exception | None) -> MeshError:
        """See `Connector`. With TLS 1.3 a refusal of our certificate comes after the handshake."""
        if exc is not None and refused_our_certificate(exc):
            return PeerRejectedUs(
                f"{self._name()} refused this mesh's certificate: {describe_tls_failure(exc)}"
            )
        why = f" ({describe_tls_failure(exc)})" if exc is not None else ""
        return UpstreamClosed(f"{self._name()} closed the connection before answering{why}")

    def generation(self) -> int:
        """See `Connector`."""
        current = self._identity.current
        return current.generation if current is not None else -1

    async def _tcp(self, lane: Lane) -> socket.socket:
        try:
            return await open_socket(lane.worker.loop, self._endpoint.connect)
        except OSError as error:
            self._gateway_failed()
            raise ConnectFailed(f"no connection to {self._name()}: {reason(error)}") from error

    async def _tls(
        self, lane: Lane, snapshot: Snapshot, sock: socket.socket, known: KnownSession | None
    ) -> Upstream:
        upstream = Upstream(lane)
        name = self._endpoint.server_name
        session = known.session if known is not None else None
        try:
            await self._open_tls(
                lane.worker, sock, upstream, snapshot.client_context, name, session
            )
        except ssl.SSLCertVerificationError as wrong:
            raise PeerUntrusted(
                f"{self._name()} showed a certificate that does not verify under this KMS: "
                f"{wrong.verify_message}"
            ) from wrong
        except (ssl.SSLError, OSError, EOFError) as error:
            raise self._handshake_failed(error) from error
        return upstream

    def _handshake_failed(self, error: Exception) -> MeshError:
        if refused_our_certificate(error):
            return self.lost(error)
        detail = f"no TLS session with {self._name()}: {describe_tls_failure(error)}"
        if not isinstance(error, ssl.SSLError) or isinstance(error, ssl.SSLEOFError):
            detail += (
                "; the gateway ends a connection this way when it knows no such app"
                " or none of its instances answers"
            )
        return TlsFailed(detail)

    def _verify(
        self, snapshot: Snapshot, upstream: Upstream, known: KnownSession | None
    ) -> PeerIdentity:
        """Give who the target is, or end the connection, on which nothing was sent yet."""
        try:
            return self._identify(snapshot, upstream, known)
        except BaseException:
            # In order (RFC 8446 6.1), so that the other side sees a handshake and no request,
            # not a connection that failed.
            upstream.transport.close()
            raise

    def _identify(
        self, snapshot: Snapshot, upstream: Upstream, known: KnownSession | None
    ) -> PeerIdentity:
        """Hold the target's verified chain against the chain rules and the app asked for."""
        tls = upstream.transport.get_extra_info("ssl_object")
        try:
            if known is not None and tls.session_reused:
                peer: PeerIdentity | None = known.identify(tls, snapshot.peers)
            else:
                peer = snapshot.peers.identify(tls, Role.TARGET)
        except ChainRuleBroken as error:
            raise PeerUntrusted(f"{self._name()}: {error}") from error
        if peer is None:
            raise PeerUntrusted(f"{self._name()} showed no certificate")
        if peer.app_id != self._endpoint.app_id:
            raise PeerAppIdMismatch(
                f"{self._name()} is app {peer.app_id}, not {self._endpoint.app_id}"
            )
        return peer

    def _name(self) -> str:
        host = self._endpoint.server_name
        connect = self._endpoint.connect
        if host is None or host == connect.host:
            return str(connect)
        return f"{host} (by way of {connect})"
