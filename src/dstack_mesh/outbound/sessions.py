"""TLS sessions with one target, to be resumed with whom they were made, and nobody else (ADR 2)."""

from __future__ import annotations

import ssl
from typing import Any

from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.peers import VerifiedPeers, leaf_digest
from dstack_mesh.model import PeerIdentity
from dstack_mesh.relay.upstream import Upstream


class KnownSession:
    """A session, and whose chain was verified in the handshake that it comes from."""

    __slots__ = ("generation", "leaf", "peer", "session")

    def __init__(
        self, session: ssl.SSLSession, leaf: bytes, peer: PeerIdentity, generation: int
    ) -> None:
        self.session = session
        self.leaf = leaf
        """Its digest."""
        self.peer = peer
        self.generation = generation
        """Of our own identity: its context made the session, and no other can use it."""

    def identify(self, tls: Any, peers: VerifiedPeers) -> PeerIdentity:
        """Give who the peer of the resumed session is. Raises `ChainRuleBroken`."""
        shown = tls.getpeercert(binary_form=True)
        if shown is None or leaf_digest(shown) != self.leaf:
            raise ChainRuleBroken(1, "the resumed TLS session is of another certificate")
        peers.check_expiry(self.peer)
        return self.peer


class KnownSessions:
    """The session of one connector: that of the connection opened last."""

    __slots__ = ("_known", "_latest")

    def __init__(self) -> None:
        self._latest: Upstream | None = None
        self._known: KnownSession | None = None

    def offer(self, generation: int) -> KnownSession | None:
        """Give a session that may be offered to the target, if there is one."""
        if self._latest is not None:
            # Not earlier: a server of TLS 1.3 sends its tickets behind the handshake.
            self._take(self._latest)
        known = self._known
        return known if known is not None and known.generation == generation else None

    def opened(self, upstream: Upstream) -> None:
        """Learn of a connection whose peer is verified."""
        self._latest = upstream

    def ended(self, upstream: Upstream) -> None:
        """Learn that a connection is gone; nothing of it is held any more."""
        if upstream is self._latest:
            self._take(upstream)
            self._latest = None

    def clear(self) -> None:
        """Forget all: the next handshake is to be a full one."""
        self._known = self._latest = None

    def _take(self, upstream: Upstream) -> None:
        tls = upstream.transport.get_extra_info("ssl_object")
        peer = upstream.peer
        # What TLS 1.2 resumes is not bound to the whole handshake without an extension (RFC 7627).
        if tls is None or peer is None or tls.version() != "TLSv1.3":
            return
        session = tls.session
        leaf = tls.getpeercert(binary_form=True)
        if session is not None and session.has_ticket and leaf is not None:
            self._known = KnownSession(session, leaf_digest(leaf), peer, upstream.generation)
