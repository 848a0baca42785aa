"""Reading dstack's extensions: every vector, and what no KMS would write."""

from __future__ import annotations

import msgspec
import pytest
from cryptography import x509
from tests.identity.conftest import (
    APP_A,
    CERTS,
    INDEX,
    Kms,
    app_id_extension,
    app_info_extension,
    dstack_extension,
    repeat_extension,
)

from dstack_mesh.identity import extension
from dstack_mesh.identity.extension import ExtensionError, ExtensionMissingError
from dstack_mesh.model import AppInfo

_OIDS = {
    "app_id": extension.OID_APP_ID,
    "usage": extension.OID_USAGE,
    "app_info": extension.OID_APP_INFO,
}


def load(name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((CERTS / INDEX[name]["cert"]).read_bytes())


@pytest.mark.parametrize("name", INDEX)
def test_each_vector_reads_as_its_index_says(name: str) -> None:
    cert, vector = load(name), INDEX[name]

    if vector["app_id"] is None:
        with pytest.raises(ExtensionMissingError):
            extension.app_id(cert)
    elif vector["trust_under_kms1"] == "odd-encoding":
        with pytest.raises(ExtensionError) as refusal:
            extension.app_id(cert)
        assert not isinstance(refusal.value, ExtensionMissingError)
    else:
        assert extension.app_id(cert) == vector["app_id"]

    assert extension.usage(cert) == vector["special_usage"]

    app_info, expected = extension.app_info(cert), vector["app_info"]
    if expected is None:
        assert app_info is None
    else:
        assert app_info == AppInfo(**{name: expected[name] for name in AppInfo.__slots__})


@pytest.mark.parametrize("name", INDEX)
def test_each_vector_holds_the_extension_bytes_of_its_index(name: str) -> None:
    cert, ext_hex = load(name), INDEX[name]["ext_hex"]
    found = {ext.oid: ext.value.public_bytes().hex() for ext in cert.extensions}
    assert {label: found.get(oid) for label, oid in _OIDS.items()} == ext_hex


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 65535, 65536])
def test_octet_strings_of_every_length_form_read_back(size: int, kms: Kms) -> None:
    content = bytes(size)
    expected_header = {0: "0400", 127: "047f", 128: "048180", 256: "04820100", 65536: "0483010000"}
    assert extension.octet_string(content).hex().startswith(expected_header.get(size, "04"))
    cert = kms.leaf(extensions=[dstack_extension(extension.OID_USAGE, content)]).cert
    assert extension.usage(cert) == content.decode()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", r"not exactly one DER OCTET STRING: \(empty\)"),
        ("04", "not exactly one DER OCTET STRING: 04"),
        ("0413" + APP_A, "not exactly one DER OCTET STRING"),
        ("0415" + APP_A, "not exactly one DER OCTET STRING"),
        ("048114" + APP_A, "not exactly one DER OCTET STRING"),
        ("04820014" + APP_A, "not exactly one DER OCTET STRING"),
        ("2416" + "0414" + APP_A, "not exactly one DER OCTET STRING"),
        ("2480" + "0414" + APP_A + "0000", "not exactly one DER OCTET STRING"),
        ("0480" + APP_A + "0000", "not exactly one DER OCTET STRING"),
        ("0414" + APP_A + "00", r"not exactly one DER OCTET STRING"),
        ("0c14" + APP_A, "not exactly one DER OCTET STRING"),
        ("ff" * 33, r"(ff){32}… \(33 bytes\)"),
        ("0413" + APP_A[2:], "holds 19 bytes, expected 20"),
        ("0415" + APP_A + "aa", "holds 21 bytes, expected 20"),
        ("0400", "holds 0 bytes, expected 20"),
    ],
)
def test_an_app_id_that_is_not_04_14_and_20_bytes_is_refused(
    value: str, words: str, kms: Kms
) -> None:
    odd = x509.UnrecognizedExtension(extension.OID_APP_ID, bytes.fromhex(value))
    cert = kms.leaf(extensions=[odd]).cert
    with pytest.raises(ExtensionError, match=words):
        extension.app_id(cert)


@pytest.mark.parametrize(
    ("oid", "label"),
    [(extension.OID_APP_ID, "app-id"), (extension.OID_USAGE, "usage")],
)
def test_a_repeated_extension_is_refused_whichever_is_asked_for(
    oid: x509.ObjectIdentifier, label: str, kms: Kms
) -> None:
    cert = repeat_extension(kms.leaf(), oid).cert
    for reader in (extension.app_id, extension.usage, extension.app_info):
        with pytest.raises(ExtensionError, match=f"the {label} extension .* more than once"):
            reader(cert)


def test_a_certificate_whose_other_extensions_cannot_be_parsed_is_refused(kms: Kms) -> None:
    broken = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x05\x01")
    cert = kms.leaf(more=[broken]).cert
    with pytest.raises(ExtensionError, match="cannot be parsed"):
        extension.app_id(cert)


def test_a_usage_that_is_not_text_is_refused(kms: Kms) -> None:
    cert = kms.leaf(extensions=[dstack_extension(extension.OID_USAGE, b"\xff\xfe")]).cert
    with pytest.raises(ExtensionError, match="not UTF-8 text: fffe"):
        extension.usage(cert)


def test_app_info_may_have_elements_that_a_later_kms_appended(kms: Kms) -> None:
    info = app_info_extension(APP_A, [b"script"], {"new": 1})
    app_info = extension.app_info(kms.leaf(more=[info]).cert)
    assert app_info == AppInfo(APP_A, "01" * 32, "02" * 32, "03" * 32, "06" * 32)


def encoded(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


_EIGHT = (bytes.fromhex(APP_A), *(bytes(32) for _ in range(7)))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(encoded(*_EIGHT[:7]), id="too few"),
        pytest.param(encoded(*_EIGHT) + b"\xc0", id="trailing bytes"),
        pytest.param(encoded(*_EIGHT)[:-1], id="cut short"),
        pytest.param(encoded(APP_A, *_EIGHT[1:]), id="text for bytes"),
        pytest.param(encoded(list(_EIGHT[0]), *_EIGHT[1:]), id="list of numbers for bytes"),
        pytest.param(encoded(*_EIGHT[:3], None, *_EIGHT[4:]), id="nil for bytes"),
        pytest.param(encoded(_EIGHT[0] + b"\xaa", *_EIGHT[1:]), id="app-id of 21 bytes"),
        pytest.param(encoded(b"", *_EIGHT[1:]), id="empty app-id"),
        pytest.param(msgspec.msgpack.encode({"app_id": _EIGHT[0]}), id="a map"),
    ],
)
def test_app_info_that_is_not_dstacks_array_is_refused(content: bytes, kms: Kms) -> None:
    cert = kms.leaf(more=[dstack_extension(extension.OID_APP_INFO, content)]).cert
    with pytest.raises(ExtensionError, match="app info extension"):
        extension.app_info(cert)


def test_absent_extensions_are_absent(kms: Kms) -> None:
    cert = kms.leaf(extensions=[]).cert
    assert extension.usage(cert) is None
    assert extension.app_info(cert) is None
    with pytest.raises(
        ExtensionMissingError, match=r"no app-id extension \(1\.3\.6\.1\.4\.1\.62397"
    ):
        extension.app_id(cert)


def test_upper_case_never_appears_in_an_app_id(kms: Kms) -> None:
    cert = kms.leaf(extensions=[app_id_extension("AB" * 20)]).cert
    assert extension.app_id(cert) == "ab" * 20
