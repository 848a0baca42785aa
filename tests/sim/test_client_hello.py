"""The ClientHello parser, fed with OpenSSL's own hellos, whole, in pieces and damaged."""

from __future__ import annotations

import random
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_mesh.sim.client_hello import (
    MAX_SIZE,
    IncompleteHelloError,
    MalformedHelloError,
    server_name,
)

NAME = "aa" * 20 + "-443s.sim.dstack.test"


def client_hello(
    name: str | None = NAME, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    context.set_alpn_protocols(["http/1.1"])
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


HELLO = client_hello()


def in_records(hello: bytes, sizes: list[int]) -> bytes:
    """The same handshake message, in records of these sizes (the last one takes the rest)."""
    message, records = hello[5:], b""
    for size in [*sizes, len(message)]:
        fragment, message = message[:size], message[size:]
        if fragment:
            records += hello[:3] + len(fragment).to_bytes(2, "big") + fragment
    return records


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_name_of_a_real_hello(version: ssl.TLSVersion) -> None:
    assert server_name(client_hello(NAME, version)) == NAME


def test_name_is_lower_case_and_may_be_absent() -> None:
    assert server_name(client_hello("A.Example")) == "a.example"
    assert server_name(client_hello(None)) is None


def test_what_follows_the_hello_does_not_matter() -> None:
    assert server_name(HELLO + b"\x14\x03\x03\x00\x01\x01 early data") == NAME


def test_every_beginning_is_incomplete() -> None:
    for size in range(len(HELLO)):
        with pytest.raises(IncompleteHelloError):
            server_name(HELLO[:size])


@given(st.lists(st.integers(1, 600), max_size=40))
@settings(max_examples=200)
def test_any_split_into_records_gives_the_same_name(sizes: list[int]) -> None:
    records = in_records(HELLO, sizes)
    assert server_name(records) == NAME
    with pytest.raises(IncompleteHelloError):
        server_name(records[:-1])


def test_one_byte_records() -> None:
    assert server_name(in_records(HELLO, [1] * len(HELLO))) == NAME


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x02\x00\x00\x05",
        b"\x17\x03\x03\x00\x05",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03",
    ],
    ids=[
        "http",
        "version",
        "record type",
        "empty record",
        "long record",
        "server hello",
        "long hello",
        "cut",
    ],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedHelloError):
        server_name(data)


def test_first_byte_is_enough_to_refuse() -> None:
    with pytest.raises(MalformedHelloError):
        server_name(b"G")


def test_a_hello_without_extensions_has_no_name() -> None:
    body = b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00"
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    assert server_name(b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message) is None


def test_damage_never_raises_anything_else() -> None:
    source = random.Random(7)
    for _ in range(3_000):
        damaged = bytearray(HELLO)
        for _ in range(source.randint(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        try:
            server_name(bytes(damaged))
        except (MalformedHelloError, IncompleteHelloError):
            continue


def test_endless_hello_is_refused() -> None:
    beginning = b"\x16\x03\x01\x00\x04\x01\x00\xff\xff"
    one_byte = b"\x16\x03\x01\x00\x01\x00"
    with pytest.raises(IncompleteHelloError):
        server_name(beginning + one_byte * 100)
    with pytest.raises(MalformedHelloError, match="came to its end"):
        server_name(beginning + one_byte * (2 * MAX_SIZE // 6))
