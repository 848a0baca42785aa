from __future__ import annotations

from dstack_mesh.identity.known_root import KnownRoot


def test_the_first_one_is_known_for_good() -> None:
    root = KnownRoot()
    assert root.digest() == b""
    root.learn(b"one")
    root.learn(b"other")
    assert root.digest() == b"one"
