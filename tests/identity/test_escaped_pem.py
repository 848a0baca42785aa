"""The header with a certificate: what nginx writes is read, and nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import quote

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from tests.identity.conftest import CERTS, INDEX

from dstack_mesh.identity.escaped_pem import (
    MAX_ESCAPED_BYTES,
    EscapedPemError,
    parse_escaped_pem,
)

BEGIN, END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


def escaped(pem: bytes) -> bytes:
    """Escape as nginx does (`NGX_ESCAPE_URI_COMPONENT`): all but RFC 3986's unreserved."""
    return quote(pem, safe="").encode()


def pem_of(der: bytes, width: int = 64, eol: bytes = b"\n") -> bytes:
    text = base64.b64encode(der)
    lines = [text[at : at + width] for at in range(0, len(text), width)]
    return eol.join((BEGIN, *lines, END, b""))


def sequence(size: int) -> bytes:
    """Give a SEQUENCE of `size` bytes in all."""
    for octets in range(4):
        content = size - 2 - octets
        shortest = 0 if content < 128 else (content.bit_length() + 7) // 8
        if octets == shortest:
            length = (
                content.to_bytes(1)
                if not octets
                else bytes([0x80 | octets]) + content.to_bytes(octets)
            )
            return b"\x30" + length + bytes(content)
    raise AssertionError(f"no sequence has {size} bytes")


def refusal(value: bytes) -> str:
    with pytest.raises(EscapedPemError) as caught:
        parse_escaped_pem(value)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(INDEX))
def test_every_certificate_of_the_vectors_comes_back_as_it_was(name: str) -> None:
    pem = (CERTS / f"{name}.pem").read_bytes()
    der = parse_escaped_pem(escaped(pem))
    assert x509.load_der_x509_certificate(der) == x509.load_pem_x509_certificate(pem)
    assert escaped(pem_of(der)) == escaped(pem)


def test_what_nginx_wrote_is_read() -> None:
    # Recorded from `$ssl_client_escaped_cert`, shortened to a certificate of three bytes.
    assert parse_escaped_pem(
        b"-----BEGIN%20CERTIFICATE-----%0AMAEA%0A-----END%20CERTIFICATE-----%0A"
    ) == bytes.fromhex("300100")


@given(
    size=st.integers(2, 3000).filter(lambda size: size not in (130, 259)),
    eol=st.sampled_from([b"\n", b"\r\n"]),
)
def test_any_sequence_comes_back_as_it_was(size: int, eol: bytes) -> None:
    der = sequence(size)
    assert len(der) == size
    assert parse_escaped_pem(escaped(pem_of(der, eol=eol))) == der


def test_white_space_around_the_block_and_either_case_of_hex_digits_are_passed_over() -> None:
    value = escaped(b" \t\r\n" + pem_of(sequence(300)) + b"\n \n")
    assert parse_escaped_pem(value) == sequence(300)
    lower = b"-----BEGIN%20CERTIFICATE-----%0aMAEA%0a-----END%20CERTIFICATE-----%0a"
    assert parse_escaped_pem(lower) == b"\x30\x01\x00"


GOOD = pem_of(sequence(100))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "it is empty"),
        (b"x" * (MAX_ESCAPED_BYTES + 1), "65537 bytes; at most 65536"),
        (b"-----BEGIN CERTIFICATE-----", "not percent-encoded at byte 10"),
        (escaped(GOOD) + b"%4", f"not percent-encoded at byte {len(escaped(GOOD))}"),
        (escaped(GOOD) + b"%", f"not percent-encoded at byte {len(escaped(GOOD))}"),
        (b"%zz", "not percent-encoded at byte 0"),
        (escaped(GOOD).replace(b"%0A", b"+", 1), "not percent-encoded at byte 29"),
        (escaped(GOOD) + b"\xff", "not percent-encoded"),
        (escaped(GOOD) + b"\x00", "not percent-encoded"),
        (escaped(GOOD) + b"\n", "not percent-encoded"),  # `$` alone would not see it
    ],
)
def test_what_is_not_percent_encoding_is_refused(value: bytes, said: str) -> None:
    assert said in refusal(value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pem: b"x" + pem, "does not begin with"),
        (lambda pem: b"\0" + pem, "does not begin with"),
        (lambda pem: b"\xef\xbb\xbf" + pem, "does not begin with"),
        (lambda pem: b"\x0b" + pem, "does not begin with"),
        (lambda pem: pem + b"x", "more than white space behind"),
        (lambda pem: pem + b"\0", "more than white space behind"),
        (lambda pem: pem + pem, "more than white space behind"),
        (lambda pem: pem + b"#", "more than white space behind"),
        (lambda pem: pem.replace(END, b""), "it has no -----END"),
        (lambda pem: pem.replace(END, BEGIN), "it has no -----END"),
        (lambda pem: pem.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"), "does not begin"),
        (lambda pem: pem.replace(b"CERTIFICATE", b"X509 CERTIFICATE"), "does not begin"),
        (lambda pem: pem.replace(b"CERTIFICATE", b"PRIVATE KEY"), "does not begin"),
        (lambda pem: pem.replace(b"BEGIN", b"begin"), "does not begin"),
        (lambda pem: pem.replace(BEGIN, BEGIN + BEGIN), "not base64"),
        (lambda pem: pem.replace(BEGIN, BEGIN + b"\nProc-Type: 4,ENCRYPTED\n"), "not base64"),
        (lambda pem: pem.replace(BEGIN, BEGIN + b"\n"), "not base64"),
        (lambda pem: pem.replace(BEGIN, BEGIN + b" "), "not base64"),
        (lambda pem: pem.replace(BEGIN + b"\n", BEGIN), "not base64"),
        (lambda pem: pem.replace(b"\n" + END, END), "not base64"),
        (lambda pem: pem.replace(b"\n", b"\n\n"), "not base64"),
        (lambda pem: pem.replace(b"\n", b"\n "), "not base64"),
        (lambda pem: pem.replace(b"\n", b"\r"), "not base64"),
        (lambda pem: pem.replace(b"A", b"-", 1).replace(b"-CERT", b"ACERT"), "does not begin"),
        (lambda pem: pem.replace(b"MGIA", b"MG-A"), "not base64"),
        (lambda pem: pem.replace(b"MGIA", b"MG\x00A"), "not base64"),
        (lambda pem: pem.replace(b"MGIA", b"MG%2B"), "not base64"),
        (lambda pem: pem.replace(b"MGIA", b"MG=A"), "not base64"),
    ],
)
def test_what_is_not_one_pem_block_is_refused(change: Callable[[bytes], bytes], said: str) -> None:
    changed = change(GOOD)
    assert changed != GOOD
    assert said in refusal(escaped(changed))


@pytest.mark.parametrize("width", [63, 65, 76, 4096])
def test_lines_of_another_length_are_refused(width: int) -> None:
    assert "lines of 64 characters" in refusal(escaped(pem_of(sequence(100), width)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"MAE", "base64 is broken"),
        (b"MAEAA", "base64 is broken"),
        (b"MAE=A", "base64 is broken"),
        (b"=MAE", "base64 is broken"),
        (b"MAEA=", "base64 is "),
        (b"MA==MA==", "base64 is broken"),
        (b"MAB=", "not in the canonical form"),  # 30 00 and two bits that mean nothing
        (b"MP==", "not in the canonical form"),
    ],
)
def test_base64_that_others_may_read_differently_is_refused(text: bytes, said: str) -> None:
    assert said in refusal(escaped(BEGIN + b"\n" + text + b"\n" + END))


@pytest.mark.parametrize(
    "der",
    [
        "",
        "30",
        "3001",
        "300000",  # a byte too many
        "310100",  # a SET
        "3080",  # without an end
        "30800000",
        "308100",  # a length that fits in fewer bytes
        "30817f" + "00" * 127,
        "3082008100" + "00" * 129,
        "308180" + "00" * 127,
        "308180" + "00" * 129,
        "30ff" + "00" * 127,
        "3084ffffffff00",
    ],
)
def test_what_is_not_exactly_one_sequence_is_refused(der: str) -> None:
    assert "exactly one DER SEQUENCE" in refusal(escaped(pem_of(bytes.fromhex(der))))


def test_a_second_certificate_behind_the_first_is_refused_inside_the_base64_too() -> None:
    assert "exactly one DER SEQUENCE" in refusal(escaped(pem_of(sequence(100) * 2)))


def test_the_largest_value_is_read_in_a_moment_and_one_byte_more_is_not() -> None:
    value = escaped(pem_of(sequence(40_000)))
    padded = value + b"%0A" * ((MAX_ESCAPED_BYTES - len(value)) // 3)
    assert MAX_ESCAPED_BYTES - 3 < len(padded) <= MAX_ESCAPED_BYTES
    assert parse_escaped_pem(padded) == sequence(40_000)
    assert "at most 65536" in refusal(padded + b"%0A")


@pytest.mark.parametrize("piece", [b"%", b"%0", b"A", b"%0A", b"%2B", b"-----BEGIN%20"])
def test_many_of_the_same_take_no_time(piece: bytes) -> None:
    refusal((piece * MAX_ESCAPED_BYTES)[:MAX_ESCAPED_BYTES])


@given(st.binary(max_size=400))
def test_nothing_but_its_own_error_is_raised(value: bytes) -> None:
    for text in (value, escaped(value), escaped(BEGIN + b"\n" + value + b"\n" + END)):
        said, der = "", b"\x30"
        try:
            der = parse_escaped_pem(text)
        except EscapedPemError as error:
            said = str(error)
        assert said.isprintable()
        assert der[:1] == b"\x30"


@given(data=st.data())
def test_a_changed_byte_never_reads_as_the_same_certificate_by_chance(data: st.DataObject) -> None:
    """One certificate has one text, but for white space around it, line ends and hex case."""
    value = escaped(GOOD)
    at = data.draw(st.integers(0, len(value) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = value[:at] + bytes([byte]) + value[at + 1 :]
    try:
        der = parse_escaped_pem(changed)
    except EscapedPemError:
        return
    if der == sequence(100):
        allowed = (b"%0A", b"%20", b"%09", b"%0D")
        behind = changed.upper().partition(b"END%20CERTIFICATE-----")[2]
        assert changed.upper() == value.upper() or behind in allowed
