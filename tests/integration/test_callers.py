"""Callers from outside, at the inbound listener: whoever breaks a rule never meets the backend."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from dstack_mesh.model import AppId, TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.odd import REFUSED_BY_TLS, WRONG_CALLERS, Kind, impostor_chain
from tests.integration.harness import Answer, Client, Mesh, eventually, mesh, problem, request
from tests.integration.tls_peers import (
    VERSIONS,
    alert_of,
    call_inbound,
    caller_context,
    resumes,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLER = AppId("cc" * 20)
OTHER = AppId("dd" * 20)

ALERTS = {
    Kind.OTHER_KMS: "decrypt_error",
    Kind.SELF_SIGNED: "unknown_ca",
    Kind.LEAF_AS_CA: "unknown_ca",
    Kind.EXPIRED: "certificate_expired",
    Kind.NOT_YET_VALID: "bad_certificate",
    Kind.SUB_CA: "unknown_ca",
    Kind.WEAK_KEY: "bad_certificate",
    Kind.SERVER_ONLY_EKU: "unsupported_certificate",
}
"""What OpenSSL says of each (RFC 8446 6.2); all KMS roots have one name, so a foreign one's
signature is what does not fit."""

BY_TLS = tuple(kind for kind in WRONG_CALLERS if kind in REFUSED_BY_TLS)
BY_RULES = tuple(kind for kind in WRONG_CALLERS if kind not in REFUSED_BY_TLS)


@dataclass
class Called:
    """Sidecar `b` and its backend, as callers from outside find them."""

    mesh: Mesh

    @property
    def kms(self) -> Kms:
        return self.mesh.world.kms

    @property
    def inbound(self) -> TcpAddress:
        return self.mesh.inbound("b")

    @property
    def backend(self) -> Backend:
        return self.mesh.backends["b"]

    async def call(
        self, issued: Issued | None, method: str = "GET", path: str = "/", version: str = "1.3"
    ) -> Answer:
        """Send one request with this certificate, or none."""
        context = caller_context(self.kms.root_pem, issued, VERSIONS[version])
        return await call_inbound(self.inbound, context, method, path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def there(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Called]:
    async with mesh(tmp_path_factory.mktemp("world"), ["b"]) as one:
        await one.start("b", MESH_TLS_MIN_VERSION="1.2")
        yield Called(one)


@pytest.fixture
def untouched(there: Called) -> int:
    """How much the backend has seen before the test."""
    return there.backend.connections + len(there.backend.requests)


def seen(there: Called) -> int:
    return there.backend.connections + len(there.backend.requests)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", BY_TLS)
async def test_what_does_not_verify_is_told_by_the_fitting_alert(
    there: Called, untouched: int, kind: Kind, version: str
) -> None:
    issued = impostor_chain(there.kms, kind, CALLER, OTHER)
    context = caller_context(there.kms.root_pem, issued, VERSIONS[version])
    assert await alert_of(there.inbound, context) == ALERTS[kind]
    assert seen(there) == untouched


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", BY_RULES)
async def test_what_breaks_a_chain_rule_is_401(
    there: Called, untouched: int, kind: Kind, version: str
) -> None:
    issued = impostor_chain(there.kms, kind, CALLER, OTHER)
    for method, path in (("GET", "/"), ("POST", "/secret"), ("GET", "/health/../secret")):
        answer = await there.call(issued, method, path, version)
        problem(answer, "client_cert_untrusted", 401)
    assert (await there.call(issued, "GET", "/health", version)).status == 200
    assert seen(there) == untouched


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_good_caller_reaches_the_backend(there: Called, version: str) -> None:
    """The control: what the others are refused is there for one that keeps the rules."""
    before = len(there.backend.requests)
    answer = await there.call(there.kms.issue(CALLER), version=version)
    assert (answer.status, answer.body) == (200, b"hello\n")
    assert len(there.backend.requests) == before + 1
    assert there.backend.requests[-1].header("x-dstack-app-id") == CALLER


@pytest.mark.parametrize("version", VERSIONS)
async def test_sessions_are_resumed_where_all_are_of_tls_1_3(tmp_path: Path, version: str) -> None:
    """A resumed session has no chain to check: it is good for whom it was made with (ADR 2)."""
    async with mesh(tmp_path, ["b"]) as one:
        await one.start("b", MESH_TLS_MIN_VERSION=version)
        kms = one.world.kms
        context = caller_context(kms.root_pem, kms.issue(CALLER), VERSIONS[version])
        resumed = await asyncio.to_thread(resumes, one.inbound("b"), context)
        assert resumed is (version == "1.3")


async def test_a_refused_connection_stays_refused(there: Called, untouched: int) -> None:
    issued = impostor_chain(there.kms, Kind.APP_CA_OF_OTHER_APP, CALLER, OTHER)
    context = caller_context(there.kms.root_pem, issued)
    async with Client.connect(there.inbound, context) as client:
        for _ in range(3):
            await client.send(request("GET", "/"))
            problem(await client.answer(), "client_cert_untrusted", 401)
    assert seen(there) == untouched


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("POST", "/health"),
        ("DELETE", "/health"),
        ("GET", "/health/"),
        ("GET", "/healthz"),
        ("GET", "/Health"),
        ("GET", "//health"),
        ("GET", "/health/../secret"),
        ("GET", "/%68ealth"),
        ("OPTIONS", "*"),
        ("GET", "http://elsewhere.test/secret"),
    ],
)
async def test_without_a_certificate_nothing_but_health_is_answered(
    there: Called, untouched: int, method: str, path: str
) -> None:
    problem(await there.call(None, method, path), "client_cert_required", 401)
    assert seen(there) == untouched


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/health?from=probe"])
async def test_health_is_open(
    there: Called, untouched: int, method: str, path: str, shown: bool
) -> None:
    answer = await there.call(there.kms.issue(CALLER) if shown else None, method, path)
    assert answer.status == 200
    assert answer.error == ""
    assert (answer.body == b"") is (method == "HEAD")
    assert seen(there) == untouched


async def test_another_method_on_health_is_the_backends(there: Called) -> None:
    answer = await there.call(there.kms.issue(CALLER), "POST", "/health")
    assert answer.get(b"x-backend") == b"b"
    assert (there.backend.requests[-1].method, answer.status) == ("POST", 404)


async def test_a_certificate_that_expires_meanwhile_is_no_longer_good(there: Called) -> None:
    expiry = int(time.time()) + 2
    context = caller_context(there.kms.root_pem, there.kms.issue(CALLER, not_after=expiry))
    async with Client.connect(there.inbound, context) as client:
        await client.send(request("GET", "/"))
        assert (await client.answer()).status == 200
        await eventually(lambda: time.time() > expiry)
        before = len(there.backend.requests)
        await client.send(request("GET", "/"))
        problem(await client.answer(), "client_cert_untrusted", 401)
        assert len(there.backend.requests) == before


@pytest.mark.parametrize(
    ("allow", "let_through"),
    [
        ("any", [True, True, True]),
        ("self", [True, False, False]),
        (CALLER, [False, True, False]),
        (f"self, {CALLER.upper()}", [True, True, False]),
    ],
)
async def test_the_allow_list(tmp_path: Path, allow: str, let_through: list[bool]) -> None:
    async with mesh(tmp_path, ["b"]) as one:
        await one.start("b", MESH_ALLOWED_APPS=allow)
        there = Called(one)
        for app_id, expected in zip((one.app_id("b"), CALLER, OTHER), let_through, strict=True):
            before = seen(there)
            answer = await there.call(there.kms.issue(app_id))
            if expected:
                assert answer.status == 200
            else:
                assert app_id in str(problem(answer, "policy_denied", 403)["detail"])
                assert seen(there) == before
            assert (await there.call(there.kms.issue(app_id), "GET", "/health")).status == 200
        problem(await there.call(None), "client_cert_required", 401)


async def test_the_calling_application_is_told_of_a_denial_and_by_whom(tmp_path: Path) -> None:
    """Through a mesh of its own: what the target's mesh answered is passed on as that."""
    async with mesh(tmp_path) as one:
        await one.start("a", backend=False)
        await one.start("b", MESH_ALLOWED_APPS="self")
        for _ in range(2):
            answer = await one.call("a", "b")
            assert one.app_id("a") in str(problem(answer, "policy_denied", 403)["detail"])
            assert answer.all(b"x-dstack-mesh-error") == [b"policy_denied; remote"]
        assert not one.backends["b"].requests
        assert (await one.call("b", "b")).body == b"hello\n", "its own app may"
        answer = await one.call("a", None, headers=[("x-dstack-target-app", "zz")])
        assert answer.all(b"x-dstack-mesh-error") == [b"bad_target"], "its own mesh's word"
