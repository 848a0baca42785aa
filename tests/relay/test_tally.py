from __future__ import annotations

from dstack_mesh.relay.tally import BUCKETS, OTHERS, PeerTallies, Tally


def test_an_exchange_is_counted_once_in_everything() -> None:
    tally = Tally("outbound")
    tally.add(b"GET", 204, "", 3, 5, 0.002)
    tally.add(b"GET", 200, "", 4, 1, 0.002)
    tally.add(b"POST", 502, "peer_untrusted", 0, 9, 100.0)
    assert tally.requests == {(b"GET", 2, ""): 2, (b"POST", 5, "peer_untrusted"): 1}
    assert (tally.bytes_up, tally.bytes_down) == (7, 15)
    assert sum(tally.buckets) == 3
    assert tally.buckets[BUCKETS.index(0.0025)] == 2
    assert tally.buckets[-1] == 1
    assert tally.seconds == 100.004


def test_made_up_methods_take_no_room() -> None:
    tally = Tally("outbound")
    for number in range(1000):
        tally.add(b"M%d" % number, 200, "", 0, 0, 0.0)
    assert tally.requests == {(b"other", 2, ""): 1000}


def test_a_refused_head_is_counted_and_has_no_duration() -> None:
    tally = Tally("inbound")
    tally.refuse(400, "bad_request")
    tally.refuse(400, "bad_request")
    assert tally.requests == {(b"other", 4, "bad_request"): 2}
    assert sum(tally.buckets) == 0


def test_peers_are_bounded_and_those_beyond_share_a_tally() -> None:
    peers = PeerTallies(limit=2)
    assert peers.get("a") is peers.get("a")
    for name in ("a", "b", "c", "d"):
        peers.get(name).requests += 1
    assert {tally.name: tally.requests for tally in peers.all()} == {"a": 1, "b": 1, OTHERS: 2}
    assert [tally.name for tally in PeerTallies().all()] == []
