from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.peers import VerifiedPeers
from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.outbound.sessions import KnownSession, KnownSessions

PEER = PeerIdentity(AppId("bb" * 20), 2_000.0)
PEERS = VerifiedPeers(b"", clock=lambda: 1_000.0)


class FakeTls:
    def __init__(
        self, leaf: bytes | None = b"leaf", *, ticket: bool = True, version: str = "TLSv1.3"
    ) -> None:
        self.leaf = leaf
        self.session: Any = SimpleNamespace(has_ticket=ticket)
        self._version = version

    def version(self) -> str:
        return self._version

    def getpeercert(self, binary_form: bool) -> bytes | None:
        assert binary_form
        return self.leaf


def connection(tls: FakeTls | None, peer: PeerIdentity | None = PEER, generation: int = 1) -> Any:
    transport = SimpleNamespace(get_extra_info=lambda name: tls)
    return SimpleNamespace(transport=transport, peer=peer, generation=generation)


def offered(upstream: Any, generation: int = 1) -> KnownSession | None:
    sessions = KnownSessions()
    sessions.opened(upstream)
    return sessions.offer(generation)


def test_the_session_of_an_open_connection_is_offered_with_whom_it_was_made() -> None:
    tls = FakeTls()
    known = offered(connection(tls))
    assert known is not None
    assert known.session is tls.session
    assert known.identify(FakeTls(), PEERS) is PEER


def test_the_session_of_a_connection_outlives_it_and_holds_nothing_of_it() -> None:
    sessions, upstream = KnownSessions(), connection(FakeTls())
    assert sessions.offer(1) is None
    sessions.opened(upstream)
    sessions.ended(connection(FakeTls(b"another")))
    sessions.ended(upstream)
    assert sessions._latest is None
    known = sessions.offer(1)
    assert known is not None
    assert known.identify(FakeTls(), PEERS) is PEER


@pytest.mark.parametrize("shown", [b"another", None])
def test_a_resumed_session_of_another_leaf_is_refused(shown: bytes | None) -> None:
    known = offered(connection(FakeTls()))
    assert known is not None
    with pytest.raises(ChainRuleBroken, match="another certificate"):
        known.identify(FakeTls(shown), PEERS)


def test_a_resumed_session_ends_with_its_peers_chain() -> None:
    known = offered(connection(FakeTls()))
    assert known is not None
    with pytest.raises(ChainRuleBroken, match="expired"):
        known.identify(FakeTls(), VerifiedPeers(b"", clock=lambda: 2_000.0))


def test_an_identity_of_ours_resumes_only_what_it_made() -> None:
    assert offered(connection(FakeTls(), generation=1), generation=2) is None


@pytest.mark.parametrize(
    "upstream",
    [
        connection(None),
        connection(FakeTls(), None),
        connection(FakeTls(None)),
        connection(FakeTls(ticket=False)),
        connection(FakeTls(version="TLSv1.2")),
    ],
    ids=["not TLS", "no peer", "no leaf", "no ticket", "TLS 1.2"],
)
def test_what_cannot_be_resumed_is_not_offered(upstream: Any) -> None:
    assert offered(upstream) is None


def test_after_a_failure_the_next_handshake_is_a_full_one() -> None:
    sessions = KnownSessions()
    sessions.opened(connection(FakeTls()))
    sessions.clear()
    assert sessions.offer(1) is None
