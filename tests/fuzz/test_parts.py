"""What the fuzz targets are made of: programs, scripts, the second readers, the corpus' choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from fuzz.certificates import BASES, chain
from fuzz.targets import TARGETS

from dstack_mesh.identity import extension
from fuzz import certificate_extension, corpus, der, escaped_pem, program, rules, script


def test_split_gives_every_byte_once() -> None:
    data = bytes(range(100))
    for strides in (b"", b"\0", b"\1", b"\3\0\5", b"\x07\x02", b"\xff"):
        pieces = list(program.split(data, strides))
        assert b"".join(pieces) == data
        assert all(pieces)
    assert [len(p) for p in program.split(data[:10], b"\3\2")] == [3, 2, 3, 2]
    assert [len(p) for p in program.split(data[:10], b"\3\0\2")] == [3, 7]
    assert [len(p) for p in program.split(data, b"\1")] == [1] * 47 + [53]


def test_a_program_that_is_over_gives_zeros() -> None:
    one = program.Program(b"\1\2\3")
    assert (one.byte(), one.left, one.short(), one.left) == (1, 2, 0x203, 0)
    assert (one.byte(), one.short(), one.take(3), one.rest(), one.left) == (0, 0, b"", b"", 0)


def test_scenes_are_read_as_they_are_written() -> None:
    what, macro = script.What, b"\xfc~\xfe"
    written = script.scene(what.ACCEPT, 2) + script.scene(what.CLIENT_SENDS, 1, macro)
    assert list(script.scenes(written, 9)) == [
        script.Scene(what.ACCEPT, 2, b""),
        script.Scene(what.CLIENT_SENDS, 1, macro),
    ]
    assert len(list(script.scenes(written * 9, 5))) == 5
    assert script.spelt_out(macro, b"~Y") == b"GET / HTTP/1.1\r\nHost: a\r\n~Y"


def test_the_second_reader_of_der_reads_what_it_writes() -> None:
    for size in (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x10000):
        written = der.encode(der.OCTET_STRING, b"x" * size)
        assert der.only(written, der.OCTET_STRING) == b"x" * size
        assert extension.octet_string(b"x" * size) == written
    for wrong in (b"", b"\x04", b"\x04\x01", b"\x04\x80", b"\x04\x81\x01a", b"\x04\x82\x00\x81"):
        with pytest.raises(ValueError, match=r"."):
            der.only(wrong, der.OCTET_STRING)


@pytest.mark.parametrize("name", BASES)
def test_the_second_reader_finds_what_the_library_finds(name: str) -> None:
    for link in chain(name):
        cert = x509.load_der_x509_certificate(link)
        assert der.signed_part(link) == cert.tbs_certificate_bytes
        assert len(der.extensions(link)) == len(cert.extensions)
    again = x509.load_der_x509_certificate(
        der.with_extensions(chain(name)[0], certificate_extension._encoded(
            certificate_extension.APP_ID, b"\x04\x14" + b"\x01" * 20, critical=False
        ))
    )  # fmt: skip
    assert extension.app_id(again) == "01" * 20


def test_trailers_out_of_order_are_found() -> None:
    came = [(b"X-A", b"1"), (b"ETag", b"2")]
    rules.check_trailers(came, came, frozenset())
    for passed in (came[::-1], [*came, came[0]], [(b"X-A", b"2")], came[:1]):
        with pytest.raises(AssertionError):
            rules.check_trailers(passed, came, frozenset())


def test_the_smallest_corpus_runs_what_all_of_it_ran() -> None:
    arcs = {
        b"aa": frozenset({("f", 1, 2), ("f", 2, 3)}),
        b"b": frozenset({("f", 1, 2)}),
        b"cc": frozenset({("f", 1, 2), ("f", 2, 3)}),
        b"d": frozenset({("f", 9, 9)}),
    }
    kept = corpus.smallest(arcs)
    assert kept[:2] == [b"cc", b"d"] or kept[:2] == [b"aa", b"d"]
    assert b"b" in kept
    assert len(kept) == 3


def test_a_trace_tells_ways_apart() -> None:
    target = TARGETS["gateway_domain"]
    found = corpus.arcs_of(target, [b"g.example", b"h.example", b"10.1"])
    assert found[b"g.example"] == found[b"h.example"] != found[b"10.1"]
    assert all(Path(name).name == "gateway_domain.py" for name, _, _ in found[b"10.1"])


def test_what_nginx_writes_is_what_seeds_are_made_of() -> None:
    assert escaped_pem.SEEDS[0].startswith(b"-----BEGIN%20CERTIFICATE-----%0A")
    assert escaped_pem.SEEDS[0].endswith(b"%3D%0A-----END%20CERTIFICATE-----%0A") or (
        b"%3D" not in escaped_pem.SEEDS[0]
    )
