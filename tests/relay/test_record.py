from __future__ import annotations

from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.record import Record
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import parse_request_line


def test_an_exchange_that_has_just_begun_knows_its_request_and_nothing_else() -> None:
    line = parse_request_line(b"GET /a HTTP/1.1")
    fields = parse_request_fields(b"Host: a\r\n", 1, frozenset())
    record = Record(line, fields, 12.5)
    assert (record.line, record.fields, record.started) == (line, fields, 12.5)
    unknown = {name: getattr(record, name) for name in Record.__slots__}
    for name in ("line", "fields", "started"):
        del unknown[name]
    assert not any(unknown.values())
    assert not record.ended


def test_an_exchange_is_its_record() -> None:
    assert issubclass(Exchange, Record)
