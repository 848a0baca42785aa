"""Each oracle against a mesh with a fault in it: what cannot fail proves nothing."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography import x509
from fuzz.targets import TARGETS

from dstack_mesh.errors import BadRequest
from dstack_mesh.identity import chain as chain_rules
from dstack_mesh.identity import escaped_pem as pem_parser
from dstack_mesh.identity import extension
from dstack_mesh.model import AppId, PeerIdentity, TcpAddress
from dstack_mesh.outbound import target as target_rules
from dstack_mesh.wire import body, fields, request, request_line, translate
from dstack_mesh.wire.framing import Framing, declared_framing
from dstack_mesh.wire.take_apart import NormalForm
from tests.fuzz.faults import Patch, fails, passing_on, replaced


def test_a_header_that_is_passed_on_with_a_control_byte_is_found(monkeypatch: Patch) -> None:
    passing_on(monkeypatch, lambda lines: lines.replace(b"X-A: ", b"X-A: \0"))
    fails("request_head")


def test_a_line_end_that_is_passed_on_alone_is_found(monkeypatch: Patch) -> None:
    passing_on(monkeypatch, lambda lines: lines.replace(b"\r\nX-", b"\nX-"))
    fails("request_head")


@pytest.mark.parametrize("way", ["_IN_PYTHON", "_IN_C"])
def test_a_short_way_that_takes_another_name_is_found(monkeypatch: Patch, way: str) -> None:
    from fuzz import take_apart

    other = tuple((name.replace(b"x-own", b"x-our"), flags) for name, flags in take_apart.TABLE)
    monkeypatch.setattr(take_apart, way, NormalForm(other, None))
    fails("take_apart")


def test_two_lengths_are_found(monkeypatch: Patch) -> None:
    def both(lengths: list[bytes], codings: list[bytes], minor: int) -> Any:
        return (Framing.CHUNKED, 0) if codings else declared_framing(lengths, codings, minor)

    monkeypatch.setattr(request, "declared_framing", both)
    fails("request_head")


def test_a_lost_header_is_found(monkeypatch: Patch) -> None:
    passing_on(monkeypatch, lambda lines: lines[lines.index(b"\n") + 1 :])
    fails("request_head")


def test_an_error_that_is_not_the_projects_is_found(monkeypatch: Patch) -> None:
    def fault(*_: Any) -> Any:
        raise IndexError("list index out of range")

    monkeypatch.setattr(request, "parse_request_fields", fault)
    run, seeds = TARGETS["request_head"].load()

    def play() -> None:
        for data in seeds:
            run(data)

    with pytest.raises(IndexError):
        play()


def test_an_escaped_error_text_is_wanted(monkeypatch: Patch) -> None:
    def tell(*_: Any) -> Any:
        raise BadRequest("what came is \r\n")

    monkeypatch.setattr(request_line, "parse_request_line", tell)
    fails("request_head")


def test_a_response_for_another_reader_is_found(monkeypatch: Patch) -> None:
    def no_body(*_: Any) -> Any:
        return Framing.NONE

    monkeypatch.setattr(translate, "response_framing", no_body)
    fails("response_head")


def test_a_connection_kept_with_bytes_unread_is_found(monkeypatch: Patch) -> None:
    def believe(self: translate.Response, *, excess: bool) -> None:
        self.done = True

    monkeypatch.setattr(translate.Response, "_end", believe)
    fails("response_head")


def test_an_error_header_without_its_mark_is_found(monkeypatch: Patch) -> None:
    def forget(real: Any) -> Any:
        def parse(*given: Any) -> Any:
            parsed = real(*given)
            parsed.removed = []
            return parsed

        return parse

    replaced(monkeypatch, translate, "parse_response_fields", forget)
    fails("response_head")


@pytest.mark.parametrize("name", ["request_body", "response_body"])
def test_a_decoder_that_loses_bytes_at_a_split_is_found(monkeypatch: Patch, name: str) -> None:
    def forgetful(real: Any) -> Any:
        def feed(self: Any, data: Any) -> Any:
            payload, taken = real(self, data)
            return (payload[:-1] if taken == 1 else payload), taken

        return feed

    replaced(monkeypatch, body.ChunkedDecoder, "feed", forgetful)
    replaced(monkeypatch, body.LengthDecoder, "feed", forgetful)
    fails(name)


@pytest.mark.parametrize("name", ["request_body", "response_body"])
def test_forbidden_trailers_are_found(monkeypatch: Patch, name: str) -> None:
    monkeypatch.setattr(fields, "_NEVER_IN_TRAILERS", frozenset())
    fails(name)


@pytest.mark.parametrize("name", ["request_body", "response_body"])
def test_a_chunk_longer_than_its_size_is_found(monkeypatch: Patch, name: str) -> None:
    real = body.ChunkedDecoder._feed_line

    def lenient(self: Any, data: bytes) -> int:
        if self._state == self._DATA_END and not b"\r\n".startswith(self._line + data[:1]):
            return max(1, data.find(b"\r"))
        return real(self, data)

    monkeypatch.setattr(body.ChunkedDecoder, "_feed_line", lenient)
    fails(name)


def test_an_app_id_in_another_encoding_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(extension, "_content", lambda value, oid: value[-20:])
    fails("certificate_extension")


def test_a_repeated_extension_that_is_believed_is_found(monkeypatch: Patch) -> None:
    real = extension.app_id

    def first(cert: x509.Certificate) -> AppId:
        try:
            return real(cert)
        except extension.ExtensionError:
            return AppId("aa" * 20)

    monkeypatch.setattr(extension, "app_id", first)
    fails("certificate_extension")


def test_app_info_that_says_something_else_is_found(monkeypatch: Patch) -> None:
    def swapped(real: Any) -> Any:
        def read(cert: x509.Certificate) -> Any:
            info = real(cert)
            return info and type(info)(AppId("bb" * 20), *(["00"] * 4))

        return read

    replaced(monkeypatch, extension, "app_info", swapped)
    fails("certificate_extension")


def test_an_app_ca_of_another_app_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(chain_rules, "_check_app_ca", lambda *_: None)
    fails("certificate_chain")


def test_a_foreign_root_is_found(monkeypatch: Patch) -> None:
    from fuzz import certificate_chain

    monkeypatch.setattr(chain_rules, "spki", lambda cert: certificate_chain.ROOT_SPKI)
    fails("certificate_chain")


def test_a_signature_that_is_not_looked_at_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(chain_rules, "verify_links", lambda *_: None)
    fails("certificate_chain")


def test_a_wrong_identity_is_found(monkeypatch: Patch) -> None:
    def other(*_: Any) -> PeerIdentity:
        return PeerIdentity(AppId("bb" * 20), 4e9)

    monkeypatch.setattr(chain_rules, "check_chain", other)
    fails("certificate_chain")


def test_a_wider_reading_of_pem_is_found(monkeypatch: Patch) -> None:
    import base64

    monkeypatch.setattr(pem_parser, "_decode", base64.b64decode)
    fails("escaped_pem")


def test_a_second_certificate_behind_the_first_is_found(monkeypatch: Patch) -> None:
    real = pem_parser._body
    monkeypatch.setattr(
        pem_parser, "_body", lambda pem: real(pem[: pem.find(b"D CERTIFICATE-----") + 18])
    )
    fails("escaped_pem")


def test_a_target_outside_the_gateways_domain_is_found(monkeypatch: Patch) -> None:
    def elsewhere(target: Any, gateway: Any, override: Any) -> target_rules.Endpoint:
        host = f"{target.app_id}-{target.port}s.evil.example"
        return target_rules.Endpoint(TcpAddress(host, 443), host, target.app_id)

    monkeypatch.setattr(target_rules, "endpoint", elsewhere)
    fails("target")


def test_a_malformed_port_that_is_taken_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(target_rules, "_one_port", lambda values: int(values[0]) % 65536)
    fails("target")


def test_a_gateway_domain_that_does_not_read_back_is_found(monkeypatch: Patch) -> None:
    from dstack_mesh import gateway_domain

    monkeypatch.setattr(gateway_domain, "normalise_base_domain", lambda text: text)
    fails("gateway_domain")
