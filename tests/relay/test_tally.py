from __future__ import annotations

from dstack_mesh.relay.tally import BUCKETS, Tally


def test_an_exchange_is_counted_once_in_everything() -> None:
    tally = Tally()
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
    tally = Tally()
    for number in range(1000):
        tally.add(b"M%d" % number, 200, "", 0, 0, 0.0)
    assert tally.requests == {(b"other", 2, ""): 1000}
