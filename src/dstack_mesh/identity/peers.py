"""The check of a peer after its handshake: the chain that TLS verified, against the chain rules."""

from __future__ import annotations

import _ssl
import hashlib
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dstack_mesh.identity.chain import ChainRuleBroken, check_chain
from dstack_mesh.model import PeerIdentity, Role

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable


class VerifiedPeers:
    """Checks the peer of a finished handshake against the chain rules.

    What a chain was found to be is kept by the digest of the whole verified chain and the role,
    for the `capacity` chains used last; expiry is looked at every time. One of these belongs to
    one snapshot of our own identity.
    """

    def __init__(
        self, root_spki: bytes, *, capacity: int = 1024, clock: Callable[[], float] = time.time
    ) -> None:
        self._root_spki = root_spki
        self._capacity = capacity
        self._clock = clock
        self._found: OrderedDict[bytes, PeerIdentity | tuple[int, str]] = OrderedDict()

    def identify(self, ssl_object: ssl.SSLObject, role: Role) -> PeerIdentity | None:
        """Return who the peer is; None only for a caller that showed no certificate at all.

        A caller's resumed session has no chain: it is good for whom the session was made with.
        Raises `ChainRuleBroken` for everything else: a broken rule, an unknown session, no chain.
        """
        if ssl_object.session_reused:
            return self._resumed(ssl_object, role)
        chain = verified_chain(ssl_object)
        if not chain:
            if role is Role.CALLER and ssl_object.getpeercert(binary_form=True) is None:
                return None
            raise ChainRuleBroken(1, "TLS has verified no chain for this peer")
        found = self._judge(chain, role)
        if isinstance(found, tuple):
            raise ChainRuleBroken(*found)
        self.check_expiry(found)
        known = getattr(ssl_object.context, "verified", None)
        if known is not None:
            known[leaf_digest(chain[0])] = found
        return found

    def check_expiry(self, peer: PeerIdentity) -> None:
        """Raise `ChainRuleBroken` where `peer`'s chain has expired since it was verified."""
        if self._clock() >= peer.not_after:
            expiry = datetime.fromtimestamp(peer.not_after, UTC)
            raise ChainRuleBroken(1, f"the chain expired at {expiry:%Y-%m-%dT%H:%M:%SZ}")

    def _resumed(self, ssl_object: ssl.SSLObject, role: Role) -> PeerIdentity | None:
        """Go by what was verified for this very leaf under this very context (ADR 2)."""
        known = getattr(ssl_object.context, "verified", None)
        leaf = ssl_object.getpeercert(binary_form=True)
        if role is Role.CALLER and known is not None:
            if leaf is None:
                return None
            found: PeerIdentity | None = known.get(leaf_digest(leaf))
            if found is not None:
                self.check_expiry(found)
                return found
        raise ChainRuleBroken(1, "the TLS session was resumed, and no chain was verified for it")

    def _judge(self, chain: list[bytes], role: Role) -> PeerIdentity | tuple[int, str]:
        digest = hashlib.sha256(role.value.encode())
        for der in chain:  # DER says its own length, so the concatenation is unambiguous
            digest.update(der)
        key = digest.digest()
        found = self._found.get(key)
        if found is not None:
            self._found.move_to_end(key)
            return found
        try:
            found = check_chain(chain, role, self._root_spki)
        except ChainRuleBroken as exc:
            found = exc.rule, exc.detail
        self._found[key] = found
        if len(self._found) > self._capacity:
            self._found.popitem(last=False)
        return found


def leaf_digest(leaf: bytes) -> bytes:
    """Give the name under which a leaf (DER) is remembered."""
    return hashlib.sha256(leaf).digest()


def verified_chain(ssl_object: ssl.SSLObject) -> list[bytes]:
    """Return the chain that OpenSSL verified, DER, leaf first; empty where there is none."""
    public = getattr(ssl_object, "get_verified_chain", None)  # from Python 3.13
    if public is not None:
        return list(public())
    inner: Any = ssl_object._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - the same, in 3.11
    return [cert.public_bytes(_ssl.ENCODING_DER) for cert in inner.get_verified_chain() or ()]
