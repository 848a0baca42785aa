"""Arguments of guest agent calls; the complaints are those recorded from the real agent."""

from __future__ import annotations

import pytest

from dstack_mesh.sim.arguments import Arguments, CallError, Type, from_hex, from_json, from_query

SPEC = {
    "subject": Type.TEXT,
    "alt_names": Type.TEXTS,
    "usage_server_auth": Type.FLAG,
    "not_after": Type.SECONDS,
    "report_data": Type.HEX,
}


def test_query_gives_each_type() -> None:
    found = from_query(
        "subject=a%20b&usage_server_auth=true&not_after=7&report_data=0x01fF&other=1&json", SPEC
    )
    assert found.text("subject") == "a b"
    assert found.flag("usage_server_auth")
    assert found.seconds("not_after") == 7
    assert found.data("report_data") == b"\x01\xff"
    assert "other" not in found.values


def test_json_gives_each_type() -> None:
    found = from_json(
        b'{"subject":"a","alt_names":["x","y"],"usage_server_auth":false,"not_after":7,'
        b'"report_data":"01","nope":1}',
        SPEC,
    )
    assert found.texts("alt_names") == ("x", "y")
    assert not found.flag("usage_server_auth")
    assert found.seconds("not_after") == 7
    assert found.data("report_data") == b"\x01"


def test_absent_arguments_have_defaults() -> None:
    for found in (Arguments({}), from_json(b"", SPEC), from_json(b'{"subject":null}', SPEC)):
        assert found.text("subject", "x") == "x"
        assert found.texts("alt_names") == ()
        assert not found.flag("usage_server_auth")
        assert found.seconds("not_after") is None
        assert found.data("report_data") == b""


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("alt_names=a.example", 'invalid type: string "a.example", expected a sequence'),
        ("alt_names=a&alt_names=b", 'Multiple values for one key: "alt_names"'),
        ("usage_server_auth=1", "provided string was not `true` or `false`"),
        ("not_after=x", "invalid digit found in string"),
        ("report_data=zz", "Invalid character 'z' at position 0"),
        ("report_data=123", "Odd number of digits"),
    ],
)
def test_query_complaints(query: str, complaint: str) -> None:
    with pytest.raises(CallError) as error:
        from_query(query, SPEC)
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b'{"subject":', "EOF while parsing a value at line 1 column 11"),
        (b'{"subject":5}', "invalid type: integer `5`, expected a string at line 1 column 12"),
        (b"[]", "invalid type: sequence, expected a map at line 1 column 1"),
        (b"{x", "expected value at line 1 column 2"),
        (
            b'{\n "usage_server_auth": "yes"}',
            'invalid type: string "yes", expected a boolean at line 2 column 27',
        ),
        (
            b'{"alt_names":{}}',
            "invalid type: map, expected a sequence at line 1 column 15",
        ),
        (
            b'{"not_after":true}',
            "invalid type: boolean `true`, expected u64 at line 1 column 17",
        ),
        (
            b'{"report_data":1.5}',
            "invalid type: floating point `1.5`, expected a string at line 1 column 18",
        ),
    ],
)
def test_json_complaints(body: bytes, complaint: str) -> None:
    with pytest.raises(CallError) as error:
        from_json(body, SPEC)
    assert str(error.value) == complaint


def test_hex_takes_both_cases() -> None:
    assert from_hex("aAfF") == b"\xaa\xff"
