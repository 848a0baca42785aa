"""A guest agent: the calls of a CVM's `dstack.sock`, answered in the real agent's shapes.

Certificates, keys and signatures are real. Quotes and attestations are not, and begin with
`MOCK`: nothing that verifies evidence can take them for any.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization

from dstack_mesh.model import Address, AppId, AppInfo, InstanceId
from dstack_mesh.sim.answers import (
    Fields,
    json_answer,
    page,
    protobuf_answer,
    wants_protobuf,
)
from dstack_mesh.sim.arguments import Arguments, CallError, Spec, Type, from_json, from_query
from dstack_mesh.sim.certificates import NOT_BEFORE
from dstack_mesh.sim.faults import Faults
from dstack_mesh.sim.http import HttpServer
from dstack_mesh.sim.keys import AppKeys

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_mesh.sim.kms import Kms
    from dstack_mesh.sim.messages import Answer, Request, Response

MOCK = b"MOCK: made by the dstack-mesh simulator, no evidence of anything. "
_QUOTE_SIZE = 5_010
_ATTESTATION_SIZE = 9_504
_TAPPD = "/prpc/Tappd."

_TLS_KEY: Spec = {
    "subject": Type.TEXT,
    "alt_names": Type.TEXTS,
    "usage_ra_tls": Type.FLAG,
    "usage_server_auth": Type.FLAG,
    "usage_client_auth": Type.FLAG,
    "not_before": Type.SECONDS,
    "not_after": Type.SECONDS,
    "with_app_info": Type.FLAG,
}


class GuestAgent(Faults):
    """The agent of one instance. Faults (see `Faults`) and the switches below are for tests."""

    legacy: bool
    """An agent that speaks only the older `tappd` calls, and ignores the newer fields."""

    ignore_new_fields: bool
    """An agent before 0.5.7: `not_before`, `not_after` and `with_app_info` do nothing."""

    local_key_provider: bool
    """A CVM without a KMS: `[leaf, CA]`, and no app-id in the leaf."""

    def __init__(
        self,
        kms: Kms,
        app_id: AppId,
        instance_id: InstanceId,
        *,
        app_name: str = "simulated-app",
        legacy: bool = False,
        ignore_new_fields: bool = False,
        local_key_provider: bool = False,
    ) -> None:
        self.kms = kms
        self.app_id = app_id
        self.instance_id = instance_id
        self.app_name = app_name
        self.legacy = legacy
        self.ignore_new_fields = ignore_new_fields
        self.local_key_provider = local_key_provider
        self.calls: Counter[str] = Counter()
        """How often each call came (by its name, `GetTlsKey`), failed ones included."""

        self.info = AppInfo(
            app_id=app_id,
            compose_hash=_digest("compose", app_name),
            instance_id=instance_id,
            device_id=_digest("device", instance_id),
            os_image_hash=_digest("os image"),
        )
        self._server = HttpServer(self._answer)
        self._calls: dict[str, tuple[Spec, Callable[[Arguments], Fields]]] = {
            "GetTlsKey": (_TLS_KEY, self._get_tls_key),
            "GetKey": (dict.fromkeys(("path", "purpose", "algorithm"), Type.TEXT), self._get_key),
            "GetQuote": ({"report_data": Type.HEX}, self._get_quote),
            "Attest": ({"report_data": Type.HEX}, self._attest),
            "Sign": ({"algorithm": Type.TEXT, "data": Type.HEX}, self._sign),
            "Verify": (
                {
                    "algorithm": Type.TEXT,
                    "data": Type.HEX,
                    "signature": Type.HEX,
                    "public_key": Type.HEX,
                },
                self._verify,
            ),
            "Info": ({}, lambda _: self._info()),
            "Version": ({}, lambda _: {"version": "0.6.0", "rev": "simulated"}),
            "GpuInfo": ({}, lambda _: {"attestation": ""}),
            "EmitEvent": ({"event": Type.TEXT, "payload": Type.HEX}, lambda _: {}),
        }

    async def start(self, address: Address) -> Address:
        """Listen (on one more address, if called again) and return the address bound."""
        return await self._server.start(address)

    def drop_connections(self) -> None:
        """Cut every open connection."""
        self._server.drop_connections()

    async def aclose(self) -> None:
        """Stop listening and remove the sockets. It may be started again."""
        await self._server.aclose()

    def failure(self) -> Response:
        """What `failing` and `fail_next` make it answer."""
        return json_answer(400, {"error": "simulated failure"})

    async def _answer(self, request: Request) -> Answer:
        body = await request.read()
        name = self._call_name(request)
        if name:
            self.calls[name] += 1
        if (fault := await self.fault()) is not None:
            return fault
        if name is None:
            return page(404, "Not Found")
        if not name:
            return page(422, "Unprocessable Entity")
        encode = protobuf_answer if wants_protobuf(request) else json_answer
        try:
            return encode(200, self._call(name, request, body))
        except CallError as error:
            return encode(400, {"error": str(error)})

    def _call(self, name: str, request: Request, body: bytes) -> Fields:
        found = self._calls.get(name)
        if found is None:
            raise CallError(f"Service not found: {name}")
        spec, call = found
        if request.method != "POST":
            return call(from_query(request.query, spec))
        if wants_protobuf(request) and body:
            raise CallError("failed to decode Protobuf message: buffer underflow")
        return call(from_json(body, spec))

    def _call_name(self, request: Request) -> str | None:
        """Return the call's name, empty for the bare `/`, None where the agent has no route."""
        if request.method not in {"GET", "HEAD", "POST"}:
            return None
        if not self.legacy:
            name = request.path[1:]
            return None if "/" in name else name
        if not request.path.startswith(_TAPPD):
            return None
        name = request.path.removeprefix(_TAPPD)
        return {"DeriveKey": "GetTlsKey", "TdxQuote": "GetQuote"}.get(name, name)

    def _get_tls_key(self, arguments: Arguments) -> Fields:
        old = self.legacy or self.ignore_new_fields
        not_before = None if old else arguments.seconds("not_before")
        not_after = None if old else arguments.seconds("not_after")
        if not_before is not None and not_after is not None and not_before >= not_after:
            raise CallError("not_before must be earlier than not_after")
        if self.local_key_provider:
            issue = self.kms.issue_local
        else:
            attested = arguments.flag("usage_ra_tls")
            issue = partial(
                self.kms.issue,
                self.app_id,
                app_info=self.info if arguments.flag("with_app_info") and not old else None,
                attestation=_mock(_ATTESTATION_SIZE, b"RA-TLS") if attested else None,
            )
        try:
            issued = issue(
                subject=arguments.text("subject"),
                alt_names=arguments.texts("alt_names"),
                server_auth=arguments.flag("usage_server_auth"),
                client_auth=arguments.flag("usage_client_auth"),
                not_before=NOT_BEFORE if not_before is None else not_before,
                not_after=not_after,
            )
        except (ValueError, OverflowError, OSError) as error:
            raise CallError(f"Failed to issue the certificate: {error}") from None
        return {
            "key": issued.key_pem.decode(),
            "certificate_chain": [pem.decode() for pem in issued.chain_pem],
        }

    def _info(self) -> Fields:
        info = self.info
        measured = _digest("simulated measurement", info.compose_hash)
        tcb = {
            "simulated": True,
            "mrtd": measured,
            "mr_aggregated": measured,
            "os_image_hash": info.os_image_hash,
            "compose_hash": info.compose_hash,
            "device_id": info.device_id,
            "event_log": [],
            "app_compose": json.dumps({"name": self.app_name, "runner": "docker-compose"}),
        }
        if self.local_key_provider:
            provider = {"name": "local-sgx", "id": "simulated"}
            app_cert = self.kms.issue_local(subject=self.app_name)
        else:
            provider = {"name": "kms", "id": _root_spki(self.kms).hex()}
            app_cert = self.kms.issue(self.app_id, subject=self.app_name)
        return {
            "app_id": bytes.fromhex(info.app_id),
            "instance_id": bytes.fromhex(info.instance_id),
            "app_cert": app_cert.leaf_pem.decode(),
            "tcb_info": json.dumps(tcb),
            "app_name": self.app_name,
            "device_id": bytes.fromhex(info.device_id),
            "mr_aggregated": bytes.fromhex(measured),
            "os_image_hash": bytes.fromhex(info.os_image_hash),
            "key_provider_info": json.dumps(provider),
            "compose_hash": bytes.fromhex(info.compose_hash),
            "vm_config": json.dumps({"simulated": True, "os_image_hash": info.os_image_hash}),
            "cloud_vendor": "",
            "cloud_product": "",
        }

    def _get_key(self, arguments: Arguments) -> Fields:
        key, chain = AppKeys(self.kms, self.app_id).get_key(
            arguments.text("path"), arguments.text("purpose"), arguments.text("algorithm")
        )
        return {"key": key, "signature_chain": chain}

    def _sign(self, arguments: Arguments) -> Fields:
        signature, chain, public_key = AppKeys(self.kms, self.app_id).sign(
            arguments.text("algorithm"), arguments.data("data")
        )
        return {"signature": signature, "signature_chain": chain, "public_key": public_key}

    def _verify(self, arguments: Arguments) -> Fields:
        valid = AppKeys(self.kms, self.app_id).verify(
            arguments.text("algorithm"),
            arguments.data("data"),
            arguments.data("signature"),
            arguments.data("public_key"),
        )
        return {"valid": valid}

    def _get_quote(self, arguments: Arguments) -> Fields:
        report_data = _report_data(arguments)
        return {
            "quote": _mock(_QUOTE_SIZE, report_data),
            "event_log": json.dumps([]),
            "report_data": report_data,
            "vm_config": json.dumps({"simulated": True, "os_image_hash": self.info.os_image_hash}),
            "attestation": _mock(_ATTESTATION_SIZE, report_data),
        }

    def _attest(self, arguments: Arguments) -> Fields:
        return {"attestation": _mock(_ATTESTATION_SIZE, _report_data(arguments))}


def _report_data(arguments: Arguments) -> bytes:
    given = arguments.data("report_data")
    if len(given) > 64:
        raise CallError("Report data is too long")
    return given.ljust(64, b"\0")


def _mock(size: int, content: bytes) -> bytes:
    """Fill `size` bytes: the mark that says what this is not, the content, zeros."""
    return (MOCK + content).ljust(size, b"\0")


def _digest(*labels: str) -> str:
    return hashlib.sha256("/".join(("dstack-mesh simulator", *labels)).encode()).hexdigest()


def _root_spki(kms: Kms) -> bytes:
    return kms.root.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
