"""The WebSocket echo: the RFC's own example, frames in pieces, and what a client must not do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.sim.websocket import Decoder, Frame, WebSocketError, accept_key


def masked(first: int, payload: bytes, mask: bytes = b"\x37\xfa\x21\x3d") -> bytes:
    frame = bytearray(Frame(first, payload).encode())
    frame[1] |= 0x80
    head = len(frame) - len(payload)
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes(frame[:head]) + mask + body


def test_accept_key_of_the_rfc() -> None:
    assert accept_key("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_masked_hello_of_the_rfc() -> None:
    data = bytes.fromhex("818537fa213d7f9f4d5158")
    assert Decoder().feed(data) == [Frame(0x81, b"Hello")]
    assert Frame(0x81, b"Hello").encode() == bytes.fromhex("810548656c6c6f")


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536])
def test_every_length_form(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    frame = Frame(0x82, payload[:size])
    assert Decoder().feed(masked(0x82, payload[:size])) == [frame]


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 50))
def test_frames_in_pieces(payloads: list[bytes], step: int) -> None:
    data = b"".join(masked(0x82, payload) for payload in payloads)
    decoder, found = Decoder(), []
    for at in range(0, len(data), step):
        found += decoder.feed(data[at : at + step])
    assert [frame.payload for frame in found] == payloads


def test_an_unmasked_or_giant_frame_is_refused() -> None:
    with pytest.raises(WebSocketError, match="masked"):
        Decoder().feed(Frame(0x81, b"Hello").encode())
    with pytest.raises(WebSocketError, match="over"):
        Decoder().feed(b"\x82\xff" + (1 << 40).to_bytes(8, "big"))
