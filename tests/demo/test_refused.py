"""Each act is good on a good mesh, and says so when something is let through after all."""

from __future__ import annotations

import pytest

from dstack_mesh.demo import refused
from dstack_mesh.demo.act import Act, play
from dstack_mesh.demo.stage import Stage
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.impostor import Impostor, ok_answer
from dstack_mesh.sim.kms import Kms

pytestmark = pytest.mark.asyncio(loop_scope="module")

ACTS = {act.name: act for act in refused.ACTS}
NOTHING = "0 requests reached billing's backend"


async def failed(name: str, stage: Stage) -> str:
    result = await play(ACTS[name], stage)
    assert not result.outcome.ok
    return result.outcome.happened


@pytest.mark.parametrize("act", refused.ACTS, ids=lambda act: act.name)
async def test_it_goes_well(stage: Stage, act: Act) -> None:
    result = await play(act, stage)
    assert result.outcome.ok, result.outcome.happened


async def test_what_happened_is_told(stage: Stage) -> None:
    told = {act.name: (await play(act, stage)).outcome.happened for act in refused.ACTS}
    assert told == {
        "wrong_app": f"502 peer_app_id_mismatch, it is billing\n{NOTHING}",
        "foreign_kms_target": "502 peer_untrusted\n"
        "it completed 0 handshakes and got 0 bytes of the request",
        "impostor": "502 peer_untrusted\nit completed 1 handshake and got 0 bytes of the request",
        "foreign_kms_caller": "billing's sidecar refused our certificate (alert decrypt_error)\n"
        + NOTHING,
        "no_certificate": f"401 client_cert_required\n{NOTHING}",
    }


async def test_the_right_app_at_the_address_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "other_app_id", stage.target_app.app_id)
    assert await failed("wrong_app", stage) == "200\n1 requests reached billing's backend"


@pytest.mark.parametrize("name", ["impostor", "foreign_kms_target"])
async def test_target_that_gets_the_request_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Answering(Impostor):
        def __init__(self, chain: Issued, **options: object) -> None:
            super().__init__(chain, answer=lambda data: ok_answer(data.partition(b"a body")[0]))

    def good(kms: Kms, kind: object, app_id: str, other_app_id: str) -> Issued:
        return kms.issue(app_id)

    monkeypatch.setattr(refused, "Impostor", Answering)
    monkeypatch.setattr(refused, "impostor_chain", good)
    monkeypatch.setattr(refused, "_SECONDS", 0.5)
    happened = await failed(name, stage)
    assert "0 bytes" not in happened


@pytest.mark.parametrize("name", ["foreign_kms_caller", "no_certificate"])
async def test_caller_that_is_let_in_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chain = stage.world.kms.issue(stage.caller_app.app_id)
    call = refused._call_directly

    async def with_a_good_one(stage: Stage, _: Issued | None) -> str:
        return await call(stage, chain)

    monkeypatch.setattr(refused, "_call_directly", with_a_good_one)
    assert await failed(name, stage) == "200\n1 requests reached billing's backend"
