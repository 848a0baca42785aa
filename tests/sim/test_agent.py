"""The simulated guest agent, held against the recorded calls to the real one."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from dstack_mesh.model import AppId, InstanceId, TcpAddress, UnixAddress
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.agent import MOCK, GuestAgent
from dstack_mesh.sim.kms import Kms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

APP = AppId("aa" * 20)
INSTANCE = InstanceId("cc" * 20)
BOTH = "usage_server_auth=true&usage_client_auth=true"


@contextlib.asynccontextmanager
async def running(
    *, legacy: bool = False, ignore_new_fields: bool = False, local_key_provider: bool = False
) -> AsyncIterator[tuple[GuestAgent, httpx2.AsyncClient]]:
    agent = GuestAgent(
        Kms.create(b"agent tests"),
        APP,
        INSTANCE,
        legacy=legacy,
        ignore_new_fields=ignore_new_fields,
        local_key_provider=local_key_provider,
    )
    address = await agent.start(TcpAddress("127.0.0.1", 0))
    async with httpx2.AsyncClient(base_url=f"http://{address}") as client:
        yield agent, client
    await agent.aclose()


def leaf_of(answer: httpx2.Response) -> x509.Certificate:
    assert answer.status_code == 200, answer.text
    return x509.load_pem_x509_certificate(answer.json()["certificate_chain"][0].encode())


def oids(certificate: x509.Certificate) -> list[str]:
    return [extension.oid.dotted_string for extension in certificate.extensions]


INFO_FIELDS = [
    "app_id",
    "instance_id",
    "app_cert",
    "tcb_info",
    "app_name",
    "device_id",
    "mr_aggregated",
    "os_image_hash",
    "key_provider_info",
    "compose_hash",
    "vm_config",
    "cloud_vendor",
    "cloud_product",
]
TLS_FIELDS = ["key", "certificate_chain"]
QUOTE_FIELDS = ["quote", "event_log", "report_data", "vm_config", "attestation"]


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("/Info", INFO_FIELDS),
        ("/Version", ["version", "rev"]),
        ("/Version?json=false", ["version", "rev"]),
        ("/GpuInfo", ["attestation"]),
        ("/GetKey", ["key", "signature_chain"]),
        ("/GetKey?path=a/b&purpose=test&algorithm=ed25519", ["key", "signature_chain"]),
        ("/GetQuote", QUOTE_FIELDS),
        ("/GetQuote?report_data=0x1234abcd", QUOTE_FIELDS),
        (f"/GetQuote?report_data={'ab' * 64}", QUOTE_FIELDS),
        ("/Attest?report_data=1234abcd", ["attestation"]),
        ("/GetTlsKey", TLS_FIELDS),
        (f"/GetTlsKey?subject=localhost&{BOTH}&usage_ra_tls=true", TLS_FIELDS),
        ("/EmitEvent?event=a&payload=00", []),
    ],
)
async def test_get_is_answered_in_the_recorded_shape(target: str, fields: list[str]) -> None:
    async with running() as (_, client):
        answer = await client.get(target)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == fields


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("/GetKey?algorithm=rsa", "Unsupported algorithm"),
        ("/Verify", "Unsupported algorithm"),
        (f"/GetQuote?report_data={'ab' * 65}", "Report data is too long"),
        ("/GetQuote?report_data=zz", "Invalid character 'z' at position 0"),
        ("/GetQuote?report_data=123", "Odd number of digits"),
        (
            "/GetTlsKey?alt_names=a.example",
            'invalid type: string "a.example", expected a sequence',
        ),
        ("/GetTlsKey?usage_server_auth=1", "provided string was not `true` or `false`"),
        (
            "/GetTlsKey?not_before=1900000000&not_after=1700000000",
            "not_before must be earlier than not_after",
        ),
        ("/info", "Service not found: info"),
        ("/Nope", "Service not found: Nope"),
        ("/DstackGuest.Info", "Service not found: DstackGuest.Info"),
    ],
)
async def test_errors_are_the_recorded_ones(target: str, error: str) -> None:
    async with running() as (_, client):
        answer = await client.get(target)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"error": error}


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("DELETE", "/Info", 404),
        ("OPTIONS", "/Info", 404),
        ("PUT", "/Info", 404),
        ("GET", "/Info/", 404),
        ("GET", "/a/b", 404),
        ("GET", "/prpc/Info", 404),
        ("GET", "/", 422),
    ],
)
async def test_no_such_route_is_a_page(method: str, target: str, status: int) -> None:
    async with running() as (_, client):
        answer = await client.request(method, target)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!DOCTYPE html>")


async def test_head_of_info() -> None:
    async with running() as (_, client):
        answer = await client.head("/Info")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.content == b""


JSON = {"content-type": "application/json"}


async def test_post_is_json_or_protobuf_as_its_head_says() -> None:
    async with running() as (_, client):
        for headers, target in ((JSON, "/GetTlsKey"), ({}, "/GetTlsKey?json")):
            body = b'{"subject":"localhost"}'
            answer = await client.post(target, headers=headers, content=body)
            assert list(answer.json()) == TLS_FIELDS
        refused = await client.post("/GetTlsKey", content=b'{"subject":"localhost"}')
        binary = await client.post("/Version")
        broken = await client.post("/GetTlsKey", headers=JSON, content=b'{"subject":')
        nothing = await client.post("/GetTlsKey", headers=JSON)
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/octet-stream"
    assert refused.content == b"\n3failed to decode Protobuf message: buffer underflow"
    assert binary.content == b"\n\x050.6.0\x12\x09simulated"
    assert broken.json() == {"error": "EOF while parsing a value at line 1 column 11"}
    assert nothing.status_code == 200


async def test_tls_key_as_the_mesh_asks_for_it() -> None:
    async with running() as (agent, client):
        target = f"/GetTlsKey?subject=localhost&{BOTH}&not_after=1900000000&with_app_info=true"
        answer = await client.get(target)
        again = await client.get(target)
    leaf = leaf_of(answer)
    assert leaf.not_valid_before_utc.timestamp() == certs.NOT_BEFORE
    assert leaf.not_valid_after_utc.timestamp() == 1_900_000_000
    assert certs.OID_APP_INFO.dotted_string in oids(leaf)
    key = serialization.load_pem_private_key(answer.json()["key"].encode(), None)
    assert key.public_key() == leaf.public_key()
    assert len(answer.json()["certificate_chain"]) == 3
    assert answer.json()["certificate_chain"][2].encode() == agent.kms.root_pem
    assert answer.json()["key"] != again.json()["key"]
    assert agent.calls == {"GetTlsKey": 2}


async def test_alt_names_subject_and_usages_by_post() -> None:
    arguments: dict[str, Any] = {"subject": "me", "alt_names": ["a.example", "127.0.0.1"]}
    async with running() as (_, client):
        leaf = leaf_of(await client.post("/GetTlsKey", json=arguments))
    assert leaf.subject.rfc4514_string() == "CN=me"
    assert "2.5.29.17" in oids(leaf)
    assert "2.5.29.37" not in oids(leaf)


async def test_dates_that_no_certificate_holds_are_an_error() -> None:
    async with running() as (_, client):
        answer = await client.get("/GetTlsKey?not_after=999999999999999999")
        before = await client.get("/GetTlsKey?not_after=1")
    assert answer.status_code == before.status_code == 400
    assert answer.json()["error"].startswith("Failed to issue the certificate")


async def test_evidence_is_marked_as_mock_and_carries_the_report_data() -> None:
    async with running() as (_, client):
        quote = (await client.get("/GetQuote?report_data=1234")).json()
        attestation = (await client.get("/Attest?report_data=1234")).json()["attestation"]
        leaf = leaf_of(await client.get("/GetTlsKey?usage_ra_tls=true"))
    assert quote["report_data"] == "1234" + "00" * 62
    for evidence in (quote["quote"], quote["attestation"], attestation):
        assert bytes.fromhex(evidence).startswith(MOCK + b"\x12\x34\x00")
    assert len(quote["quote"]) == 2 * 5_010
    extension = leaf.extensions.get_extension_for_oid(certs.OID_ATTESTATION).value
    assert isinstance(extension, x509.UnrecognizedExtension)
    assert MOCK in extension.value


async def test_info_holds_json_texts_and_marks_them() -> None:
    async with running() as (agent, client):
        info = (await client.get("/Info")).json()
    assert (info["app_id"], info["instance_id"]) == (APP, INSTANCE)
    tcb = json.loads(info["tcb_info"])
    assert tcb["simulated"] is True
    assert tcb["compose_hash"] == info["compose_hash"] == agent.info.compose_hash
    assert json.loads(info["key_provider_info"])["name"] == "kms"
    app_cert = x509.load_pem_x509_certificate(info["app_cert"].encode())
    assert certs.OID_APP_ID.dotted_string in oids(app_cert)


@pytest.mark.parametrize("algorithm", ["ed25519", "secp256k1"])
async def test_sign_and_verify(algorithm: str) -> None:
    call = {"algorithm": algorithm, "data": b"hello".hex()}
    async with running() as (_, client):
        signed = (await client.post("/Sign", json=call)).json()
        assert list(signed) == ["signature", "signature_chain", "public_key"]
        assert len(signed["signature_chain"]) == 3
        call |= {"signature": signed["signature"], "public_key": signed["public_key"]}
        assert (await client.post("/Verify", json=call)).json() == {"valid": True}
        call["data"] = b"hullo".hex()
        assert (await client.post("/Verify", json=call)).json() == {"valid": False}


async def test_local_key_provider_gives_no_app_id() -> None:
    async with running(local_key_provider=True) as (_, client):
        answer = await client.get(f"/GetTlsKey?{BOTH}&with_app_info=true")
        info = (await client.get("/Info")).json()
    assert len(answer.json()["certificate_chain"]) == 2
    assert certs.OID_APP_ID.dotted_string not in oids(leaf_of(answer))
    assert json.loads(info["key_provider_info"])["name"] == "local-sgx"


async def test_agent_before_0_5_7_ignores_the_newer_fields() -> None:
    async with running(ignore_new_fields=True) as (_, client):
        leaf = leaf_of(await client.get("/GetTlsKey?not_after=1900000000&with_app_info=true"))
    assert leaf.not_valid_after_utc.timestamp() > 1_900_000_000
    assert certs.OID_APP_INFO.dotted_string not in oids(leaf)


async def test_legacy_agent_speaks_only_tappd() -> None:
    body = {"path": "x", "subject": "localhost", "not_after": 1_900_000_000}
    async with running(legacy=True) as (agent, client):
        got = await client.get("/prpc/Tappd.DeriveKey?path=x&subject=localhost")
        posted = await client.post("/prpc/Tappd.DeriveKey?json", json=body)
        info = await client.get("/prpc/Tappd.Info")
        unknown = await client.get("/prpc/Tappd.Nope")
        newer = await client.get("/GetTlsKey")
    assert list(got.json()) == TLS_FIELDS
    assert leaf_of(posted).not_valid_after_utc.timestamp() > 1_900_000_000
    assert list(info.json()) == INFO_FIELDS
    assert unknown.json() == {"error": "Service not found: Nope"}
    assert newer.status_code == 404
    assert agent.calls["GetTlsKey"] == 2


async def test_faults() -> None:
    async with running() as (agent, client):
        agent.fail_next()
        failed = await client.get("/Info")
        assert (failed.status_code, failed.json()) == (400, {"error": "simulated failure"})
        assert (await client.get("/Info")).status_code == 200
        agent.nonsense = b""
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/Info")
    assert agent.calls["Info"] == 3


async def test_socket_comes_and_goes_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "dstack.sock"
    agent = GuestAgent(Kms.create(), APP, INSTANCE)
    for _ in range(2):
        await agent.start(UnixAddress(str(path)))
        transport = httpx2.AsyncHTTPTransport(uds=str(path))
        async with httpx2.AsyncClient(transport=transport) as client:
            assert (await client.get("http://agent/Version")).status_code == 200
        await agent.aclose()
        assert not path.exists()
