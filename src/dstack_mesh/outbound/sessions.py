"""TLS sessions with one target, to be resumed with whom they were made, and nobody else (ADR 2)."""

from __future__ import annotations

import logging
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.peers import VerifiedPeers, leaf_digest
from dstack_mesh.log import event
from dstack_mesh.model import PeerIdentity
from dstack_mesh.relay.upstream import Upstream

log = logging.getLogger(__name__)

MOST_COPIES: Final = 2_000
"""Sessions copied in the life of a process whose Python leaks them: 13 MB in all."""

_LEFT_ALONE: Final = 600.0
"""Seconds without a look at the tickets of a target that gave none, or twice one of no use."""


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


def leaks(version: tuple[int, ...] = sys.version_info[:3]) -> bool:
    """Tell whether this Python loses 6.6 KB with each look at a session (its issue 116810)."""
    return version < (3, 12, 8) or (3, 13) <= version < (3, 13, 1)


class Copies:
    """How many sessions may still be copied."""

    def __init__(self, most: int | None) -> None:
        """`most` is None where there is no limit."""
        self._most = self._left = most

    def take(self) -> bool:
        """Tell whether there is one left, and use it."""
        if self._left is None:
            return True
        if self._left == 0:
            return False
        self._left -= 1
        if self._left == 0:
            event(log, logging.INFO, "sessions_no_longer_resumed", copies=self._most)
        return True


_OF_THIS_PROCESS: Final = Copies(MOST_COPIES if leaks() else None)


class KnownSessions:
    """The session that a connector offers, of one of its connections.

    Python gives no session but as a copy, which costs 0.2 ms, and some Pythons leak it. So one is
    used again (RFC 8446 C.4 would have a new one each time, lest who listens connects the
    connections: they are from one address to one name anyway), and a target whose tickets are of no
    use is left alone for a while.
    """

    __slots__ = ("_clock", "_copies", "_known", "_latest", "_look_again", "_refused")

    def __init__(
        self, clock: Callable[[], float] = time.time, copies: Copies = _OF_THIS_PROCESS
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._clock = clock
        self._copies = copies
        self._latest: Upstream | None = None
        self._known: KnownSession | None = None
        self._look_again = 0.0
        self._refused = 0
        """Sessions offered and not resumed, one after the other."""

    def offer(self, generation: int) -> KnownSession | None:
        """Give a session that may be offered to the target, if there is one."""
        if self._latest is not None and self._latest.reused:
            # Not earlier: a server of TLS 1.3 sends its tickets behind the handshake, so they are
            # sure to be here only with a response.
            self._take(self._latest)
        known = self._known
        if known is None or known.generation != generation:
            return None
        return known if self._clock() < known.peer.not_after else None

    def opened(self, upstream: Upstream, offered: KnownSession | None) -> None:
        """Learn of a connection whose peer is verified, and to which `offered` was offered."""
        self._latest = upstream
        if offered is None:
            return
        if upstream.transport.get_extra_info("ssl_object").session_reused:
            self._refused = 0
        elif offered is self._known:
            self._forget()  # the target has a new identity, or has had enough of that session
            self._refused += 1
            if self._refused > 1:
                self._look_again = self._clock() + _LEFT_ALONE

    def ended(self, upstream: Upstream) -> None:
        """Learn that a connection is gone; nothing of it is held any more."""
        if upstream is self._latest:
            if not self._take(upstream):
                self._look_again = self._clock() + _LEFT_ALONE
            self._latest = None

    def clear(self) -> None:
        """Forget all: the next handshake is to be a full one."""
        self._forget()
        self._latest = None

    def _forget(self) -> None:
        self._known, self._look_again = None, 0.0

    def _take(self, upstream: Upstream) -> bool:
        """Tell whether there is a session of `upstream`, or need not be one."""
        now, known = self._clock(), self._known
        is_ours = known is None or known.generation == upstream.generation
        if now < self._look_again and is_ours:
            return True
        tls = upstream.transport.get_extra_info("ssl_object")
        peer = upstream.peer
        # What TLS 1.2 resumes is not bound to the whole handshake without an extension (RFC 7627).
        if tls is None or peer is None or tls.version() != "TLSv1.3":
            return False
        leaf = tls.getpeercert(binary_form=True)
        if leaf is None or not self._copies.take():
            return False
        session = tls.session
        if session is None or not session.has_ticket:
            return False
        self._known = KnownSession(session, leaf_digest(leaf), peer, upstream.generation)
        self._look_again = now + session.ticket_lifetime_hint / 2
        return True
