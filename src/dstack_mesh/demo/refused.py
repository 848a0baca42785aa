"""Requests that the mesh is to refuse, with what reached the other side of them."""

from __future__ import annotations

import asyncio
import ssl

from dstack_mesh.demo import client
from dstack_mesh.demo.act import Act, Outcome
from dstack_mesh.demo.client import Answer
from dstack_mesh.demo.stage import CALLER, OTHER, TARGET, Stage
from dstack_mesh.identity.tls import describe_tls_failure
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import Kind, impostor_chain

_SECRET = b"a body that nobody but the right app may read"
_SECONDS = 10.0


async def _wrong_app(stage: Stage) -> Outcome:
    stage.lead_astray(stage.other_app_id, stage.target_app.host)
    before = len(stage.backend.requests)
    answer = await _post_to_other(stage)
    reached = len(stage.backend.requests) - before
    named = stage.target_app.app_id in answer.field("detail")
    return Outcome(
        ok=str(answer) == "502 peer_app_id_mismatch" and named and reached == 0,
        happened=f"{answer}{f', it is {TARGET}' if named else ''}\n{_requests(reached)}",
    )


async def _foreign_target(stage: Stage) -> Outcome:
    answer, impostor = await _call_impostor(stage, Kind.OTHER_KMS)
    return Outcome(
        ok=str(answer) == "502 peer_untrusted"
        and impostor.connections == 1
        and impostor.handshakes == impostor.application_bytes == 0,
        happened=f"{answer}\n{_arrived(impostor)}",
    )


async def _impostor(stage: Stage) -> Outcome:
    answer, impostor = await _call_impostor(stage, Kind.APP_CA_OF_OTHER_APP)
    return Outcome(
        ok=str(answer) == "502 peer_untrusted"
        and impostor.handshakes == 1
        and impostor.application_bytes == 0,
        happened=f"{answer}\n{_arrived(impostor)}",
    )


async def _foreign_caller(stage: Stage) -> Outcome:
    before = len(stage.backend.requests)
    chain = Kms.create().issue(stage.caller_app.app_id)
    said = await _call_directly(stage, chain)
    reached = len(stage.backend.requests) - before
    refused = "refused our certificate" in said
    return Outcome(ok=refused and reached == 0, happened=f"{said}\n{_requests(reached)}")


async def _nameless_caller(stage: Stage) -> Outcome:
    before = len(stage.backend.requests)
    said = await _call_directly(stage, None)
    reached = len(stage.backend.requests) - before
    return Outcome(
        ok=said == "401 client_cert_required" and reached == 0,
        happened=f"{said}\n{_requests(reached)}",
    )


async def _post_to_other(stage: Stage) -> Answer:
    headers = {"x-dstack-target-app": stage.other_app_id, "authorization": "Bearer of-value"}
    return await client.post(stage.caller.outbound, "/upload", headers, [_SECRET], len(_SECRET))


async def _call_impostor(stage: Stage, kind: Kind) -> tuple[Answer, Impostor]:
    """Call the other app while an impostor of this kind is where the gateway leads."""
    chain = impostor_chain(
        stage.world.kms, kind, stage.other_app_id, other_app_id=stage.target_app.app_id
    )
    with Impostor(chain, client_ca_pem=stage.world.kms.root_pem) as impostor:
        stage.lead_astray(stage.other_app_id, impostor.address.host, impostor.address.port)
        answer = await _post_to_other(stage)
        # What it counts, it counts in its own threads: let it see the connection's end first.
        await asyncio.to_thread(
            impostor.wait, lambda: impostor.closed + len(impostor.failures) >= 1, _SECONDS
        )
    # Where a mesh that is kept running is to find it: see `play.suggestions`.
    stage.lead_astray(stage.other_app_id, stage.target_app.host)
    return answer, impostor


async def _call_directly(stage: Stage, chain: Issued | None) -> str:
    """Call the target's sidecar past the mesh, with a chain of the caller's own choice."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whoever does this has no reason to verify the target
    if chain is not None:
        chain.load_into(context)
    try:
        return str(
            await client.get(stage.target_app.env["MESH_INBOUND_LISTEN"], "/echo", tls=context)
        )
    except ssl.SSLError as error:
        return describe_tls_failure(error).replace("the peer", f"{TARGET}'s sidecar")


def _requests(count: int) -> str:
    return f"{count} requests reached {TARGET}'s backend"


def _arrived(impostor: Impostor) -> str:
    handshakes = "1 handshake" if impostor.handshakes == 1 else f"{impostor.handshakes} handshakes"
    return f"it completed {handshakes} and got {impostor.application_bytes} bytes of the request"


ACTS = (
    Act(
        "wrong_app",
        f"{CALLER} calls {OTHER}, and the gateway leads to {TARGET}",
        "502 peer_app_id_mismatch, and no request gets there",
        _wrong_app,
    ),
    Act(
        "foreign_kms_target",
        f"{CALLER} calls {OTHER}, and a server of another KMS answers",
        "502 peer_untrusted, in the handshake",
        _foreign_target,
    ),
    Act(
        "impostor",
        f"{CALLER} calls {OTHER}, and an impostor answers: its certificate names {OTHER}, "
        f"but is signed by {TARGET}'s CA",
        "502 peer_untrusted: the handshake completes, and then not one byte is sent",
        _impostor,
    ),
    Act(
        "foreign_kms_caller",
        f"somebody calls {TARGET} as {CALLER}, with a certificate of another KMS",
        "refused in the handshake, and no request gets to the backend",
        _foreign_caller,
    ),
    Act(
        "no_certificate",
        f"somebody calls {TARGET} without a certificate",
        "401 client_cert_required, and no request gets to the backend",
        _nameless_caller,
    ),
)
