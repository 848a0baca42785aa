"""Policy and routes, end to end: two real sidecars, and whoever is denied never meets a backend."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstack_mesh.inbound.compiled import compile_inbound
from dstack_mesh.model import AppId, AppInfo
from dstack_mesh.settings.load import load_settings
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.certificates import Issued
from tests.integration.harness import (
    Answer,
    Client,
    Mesh,
    Origin,
    answers,
    mesh,
    origin,
    problem,
    request,
)
from tests.integration.nginx import nginx_mode
from tests.integration.tls_peers import call_inbound, caller_context

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OTHER = AppId("dd" * 20)
COMPOSE = "c1" * 32


def rules_file(directory: Path, text: str) -> Path:
    file = directory / "policy.toml"
    file.write_text(text)
    return file


def reading(one: Mesh) -> str:
    return f"""
        [[inbound.rule]]
        name = "no secrets"
        action = "deny"
        paths = ["/public/secret/**"]
        [[inbound.rule]]
        name = "a may read"
        action = "allow"
        apps = ["{one.app_id("a")}"]
        methods = ["GET", "HEAD"]
        paths = ["/public/**"]
        [[inbound.rule]]
        name = "this build may write"
        action = "allow"
        methods = ["POST"]
        compose_hash = ["{COMPOSE}"]
    """


class Guarded:
    """Sidecars `a` and `b`; what comes to `b`'s backend is recorded byte by byte."""

    def __init__(self, one: Mesh, backend: Origin) -> None:
        self.mesh = one
        self.backend = backend

    async def call(self, method: str, path: str, issued: Issued, body: bytes = b"") -> Answer:
        """Call `b` from outside, as whoever `issued` says."""
        context = caller_context(self.mesh.world.kms.root_pem, issued)
        async with Client.connect(self.mesh.inbound("b"), context) as client:
            await client.send(request(method, path, [], body))
            return await client.answer(method)

    def issue(self, name: str = "a", compose_hash: str | None = None) -> Issued:
        app_id = self.mesh.app_id(name) if name in self.mesh.world.apps else AppId(name)
        info = None
        if compose_hash is not None:
            info = AppInfo(app_id, compose_hash, "11" * 20, "22" * 32, "33" * 32)
        return self.mesh.world.kms.issue(app_id, app_info=info)

    def count(self, decision: str) -> int:
        text = self.mesh.sidecars["b"].metrics.text()
        name = f'dstack_mesh_policy_decisions_total{{decision="{decision}"}} '
        found = [line.removeprefix(name) for line in text.splitlines() if line.startswith(name)]
        return int(found[0]) if found else 0


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with origin(answers(*[OK] * 20)) as (backend, address), mesh(tmp_path) as one:
        await one.start("a", backend=False)
        file = rules_file(tmp_path, reading(one))
        await one.start("b", config=file, MESH_BACKEND=str(address))
        yield Guarded(one, backend)


def events(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    return [vars(one)["fields"] for one in caplog.records if one.getMessage() == name]


async def test_through_both_sidecars(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dstack_mesh")
    one = guarded.mesh
    for method, path, rule in (
        ("PUT", "/public/x", None),
        ("GET", "/other", None),
        ("DELETE", "/public/secret/x", "no secrets"),
        ("GET", "/public/secret", "no secrets"),
    ):
        answer = await one.call("a", "b", method, path, [("x-request-id", "r-7")], b"body")
        assert answer.error == "policy_denied; remote"
        fields = problem(answer, "policy_denied", 403)
        assert (rule or "no rule lets it through") in str(fields["detail"])
        assert fields["request_id"] == "r-7"
        logged = events(caplog, "policy_denied")[-1]
        assert logged["caller"] == one.app_id("a")
        assert (logged["rule"], logged["method"], logged["path"]) == (rule, method, path)
        assert logged["request_id"] == "r-7"
    assert guarded.backend.wires == [], "nobody has even connected to the backend"
    assert (await one.call("a", "b", "GET", "/public/x?q=1")).body == b"ok"
    assert guarded.backend.received.startswith(b"GET /public/x?q=1 HTTP/1.1\r\n")
    assert (guarded.count("deny"), guarded.count("allow")) == (4, 1)


SNEAKY = (
    *(
        "/public/../other",
        "/public/./x",
        "/public//x",
        "//public/x",
        "/public/..",
        "/public/%2e%2e/",
    ),
    *("/public/..;/other", "/public/..%2fother", "/public%2fx", "/public/%5c..%5cother"),
    *("/public\\..\\other", "/public/x%00.html", "/public/%zz", "/public/%2E/x"),
)


async def test_no_other_way_of_writing_a_path_gets_through(guarded: Guarded) -> None:
    issued = guarded.issue("a")
    for path in SNEAKY:
        fields = problem(await guarded.call("GET", path, issued), "bad_request", 400)
        assert "not in normal form" in str(fields["detail"]), path
    for path in (
        "/public/secret",
        "/public/s%65cret/x",
        "/%70ublic/secret/",
        "/Public/x",
        "/public%3Fx",
    ):
        problem(await guarded.call("GET", path, issued), "policy_denied", 403)
    for method in ("get", "POST", "PUT", "PROPFIND", "OPTIONS"):
        problem(await guarded.call(method, "/public/x", issued, b"data"), "policy_denied", 403)
    assert guarded.backend.wires == []
    assert (await guarded.call("GET", "/public/%78?a=/../b", issued)).body == b"ok"
    assert guarded.backend.received.startswith(b"GET /public/%78?a=/../b HTTP/1.1\r\n")


async def test_a_body_on_its_way_never_reaches_the_backend(guarded: Guarded) -> None:
    context = caller_context(guarded.mesh.world.kms.root_pem, guarded.issue("a"))
    async with Client.connect(guarded.mesh.inbound("b"), context) as client:
        await client.send(request("PUT", "/public/x", [("Content-Length", "1000000")])[:-2])
        await client.send(b"\r\n" + b"secret " * 10_000)
        problem(await client.answer("PUT"), "policy_denied", 403)
    assert guarded.backend.wires == []


async def test_what_the_certificate_says_of_the_build(guarded: Guarded) -> None:
    for name in ("a", OTHER):
        right = guarded.issue(name, COMPOSE)
        assert (await guarded.call("POST", "/x", right, b"data")).body == b"ok"
        before = len(guarded.backend.received)
        for wrong in (guarded.issue(name, "00" * 32), guarded.issue(name)):
            problem(await guarded.call("POST", "/x", wrong, b"data"), "policy_denied", 403)
        assert len(guarded.backend.received) == before


async def test_another_policy_from_one_request_to_the_next(
    guarded: Guarded, tmp_path: Path
) -> None:
    def change(text: str) -> None:
        inbound = load_settings({}, {}, rules_file(tmp_path, text)).settings.inbound
        guarded.mesh.sidecars["b"].policy.replace(*compile_inbound(inbound))

    context = caller_context(guarded.mesh.world.kms.root_pem, guarded.issue("a"))
    async with Client.connect(guarded.mesh.inbound("b"), context) as client:

        async def ask() -> Answer:
            await client.send(request("GET", "/other"))
            return await client.answer()

        problem(await ask(), "policy_denied", 403)
        change("[inbound]\nallow = 'any'")
        assert (await ask()).body == b"ok"
        change("[inbound]\nallow = 'self'")
        problem(await ask(), "policy_denied", 403)
        change("[inbound]\nallow = 'self'\npolicy_mode = 'audit'")
        assert (await ask()).body == b"ok"
    assert len(guarded.backend.wires) == 1
    assert (guarded.count("deny"), guarded.count("allow"), guarded.count("audit")) == (2, 1, 1)


async def test_audit_mode_lets_all_through_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "dstack_mesh")
    async with mesh(tmp_path) as one:
        file = rules_file(tmp_path, reading(one))
        await one.start("a", backend=False)
        await one.start("b", config=file, MESH_POLICY_MODE="audit")
        assert (await one.call("a", "b", "GET", "/public/x")).status == 404
        assert (await one.call("a", "b", "GET", "/echo")).status == 200
        assert (await one.call("a", "b", "GET", "/public/../echo")).status == 404
        assert (await one.call("a", "b", "GET", "/public/secret")).status == 404
        assert len(one.backends["b"].requests) == 4
        audited = events(caplog, "policy_audited")
        assert [one["rule"] for one in audited] == [None, None, "no secrets"]
        assert events(caplog, "policy_denied") == []
        guarded = Guarded(one, Origin(answers()))
        assert (guarded.count("allow"), guarded.count("audit")) == (1, 3)
        assert guarded.count("deny") == 0


# Routes.


async def ready_inbound(one: Mesh) -> tuple[int, str]:
    async with Client.connect(one.admin("b")) as client:
        await client.send(request("GET", "/readyz/inbound"))
        answer = await client.answer()
    return answer.status, json.loads(answer.body)["checks"]["backend"]["reason"]


async def test_each_backend_gets_its_own(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        files, slow = Backend("files"), Backend("slow")
        try:
            files_at, slow_at = await files.start(), await slow.start()
            text = f"""
                [[inbound.route]]
                host = "Files"
                backend = "{files_at}"
                [[inbound.route]]
                path = "/slow"
                backend = "{slow_at}"
            """
            await one.start("a", backend=False)
            await one.start("b", config=rules_file(tmp_path, text))

            async def who(path: str, host: str = "x") -> bytes | None:
                answer = await one.call("a", "b", "GET", path, [("Host", host)])
                return answer.get(b"x-backend")

            assert await who("/") == b"b"
            assert await who("/", "files") == b"files"
            assert await who("/slow", "FILES:8080") == b"files"
            assert await who("/slow") == b"slow"
            many = [who("/slow") if n % 2 else who("/", "files.") for n in range(10)]
            assert await asyncio.gather(*many) == [b"files", b"slow"] * 5
            sneaky = await one.call("a", "b", "GET", "/x/../slow", [("Host", "x")])
            problem(sneaky, "bad_request", 400)
            assert len(one.backends["b"].requests) == 1
            status, reason = await ready_inbound(one)
            assert (status, reason.count(" answers")) == (200, 3)
        finally:
            await files.aclose()
            await slow.aclose()
        status, reason = await ready_inbound(one)
        assert status == 503
        assert f"{files_at} does not answer" in reason
        assert await who("/") == b"b"


# Nginx mode.


async def test_rules_behind_nginx(tmp_path: Path) -> None:
    async with nginx_mode(tmp_path, rules=READ_ONLY) as front:
        issued = front.issue("a")

        async def call(method: str, path: str, who: Issued = issued) -> Answer:
            return await call_inbound(front.address, front.caller(who), method, path)

        assert (await call("GET", "/echo?a=/../b")).status == 200
        assert (await call("GET", "/%65cho")).status == 404, "the backend gets it as it was sent"
        before = len(front.backend.requests)
        for method, path in (
            *(("PUT", "/echo"), ("GET", "/other"), ("GET", "/echo/"), ("GET", "/x/../echo")),
            *(("GET", "//echo"), ("GET", "/x/%2e%2e/echo"), ("GET", "/x%2f..%2fecho")),
            *(("GET", "/echo/..;/x"), ("GET", "/echo#x"), ("GET", "/./echo")),
        ):
            answer = await call(method, path)
            assert answer.error in ("policy_denied", "bad_request"), path
            assert answer.status == (403 if answer.error == "policy_denied" else 400)
        assert len(front.backend.requests) == before
        fields = problem(await call("GET", "/x/../echo"), "policy_denied", 403)
        assert "not in normal form" in str(fields["detail"])
        info = AppInfo(front.mesh.app_id("a"), COMPOSE, "11" * 20, "22" * 32, "33" * 32)
        kms = front.mesh.world.kms
        right = kms.issue(info.app_id, app_info=info)
        wrong = kms.issue(info.app_id, app_info=replace(info, compose_hash="00" * 32))
        assert (await call("PUT", "/echo", right)).status == 200
        problem(await call("PUT", "/echo", wrong), "policy_denied", 403)


READ_ONLY = f"""
[[inbound.rule]]
name = "read"
action = "allow"
methods = ["GET"]
paths = ["/echo"]
[[inbound.rule]]
name = "this build"
action = "allow"
compose_hash = ["{COMPOSE}"]
"""
