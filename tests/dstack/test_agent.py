"""The guest agent's client, held against answers in the shapes of the real agent's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dstack_mesh.dstack.agent import AgentClient, AgentError, TlsKey
from dstack_mesh.identity.source import SourceError
from dstack_mesh.model import Address, TcpAddress, UnixAddress

Answer = tuple[int, str, bytes]
Call = tuple[str, str, dict[str, str], bytes]

HTML = (404, "text/html; charset=utf-8", b"<!DOCTYPE html><title>404 Not Found</title>")
KEY = {"key": "a PEM private key", "certificate_chain": ["leaf", "app CA", "root"]}


def json_answer(value: object, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


def refusal(error: str) -> Answer:
    return json_answer({"error": error}, 400)


class FakeAgent:
    """Answers each path as told, anything else as an agent that does not know the call."""

    def __init__(self, answers: dict[str, Answer], unknown: Answer) -> None:
        self.answers = answers
        self.unknown = unknown
        self.calls: list[Call] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip().split("\r\n")
            method, target, _ = first.split(" ")
            fields = {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}
            body = await reader.readexactly(int(fields.get("content-length", "0")))
            self.calls.append((method, target, fields, body))
            status, kind, content = self.answers.get(target, self.unknown)
            writer.write(
                f"HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\n"
                f"content-length: {len(content)}\r\n\r\n".encode()
                + content
            )
            await writer.drain()
        finally:
            writer.close()


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, path: Path | None = None) -> AsyncIterator[Address]:
    address: Address
    if path is not None:
        server = await asyncio.start_unix_server(handler, path)
        address = UnixAddress(str(path))
    else:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        address = TcpAddress("127.0.0.1", server.sockets[0].getsockname()[1])
    async with server:
        yield address


async def test_the_version(tmp_path: Path) -> None:
    agent = FakeAgent({"/Version": json_answer({"version": "0.6.0", "rev": "x"})}, HTML)
    async with listening(agent.serve, tmp_path / "dstack.sock") as address:
        assert await AgentClient(address).version() == "0.6.0"
    older = FakeAgent({}, (404, "text/html", b"<h1>no"))
    async with listening(older.serve, tmp_path / "older.sock") as address:
        assert await AgentClient(address).version() is None


async def test_a_key_is_asked_for_in_json_for_both_roles(tmp_path: Path) -> None:
    agent = FakeAgent({"/GetTlsKey": json_answer(KEY)}, HTML)
    async with listening(agent.serve, tmp_path / "dstack.sock") as address:
        client = AgentClient(address)
        key, chain = await client.get_tls_key(subject="mesh", not_after=1_800_000_000)
        await client.aclose()
    assert (key, chain) == (KEY["key"], KEY["certificate_chain"])
    ((method, target, fields, body),) = agent.calls
    assert (method, target) == ("POST", "/GetTlsKey")
    assert fields["content-type"] == "application/json"
    assert json.loads(body) == {
        "subject": "mesh",
        "usage_server_auth": True,
        "usage_client_auth": True,
        "not_after": 1_800_000_000,
        "with_app_info": True,
    }


@pytest.mark.parametrize(
    "unknown", [HTML, refusal("Service not found: GetTlsKey"), (405, "text/plain", b"")]
)
async def test_an_agent_that_does_not_know_the_call_is_asked_the_older_one(unknown: Answer) -> None:
    agent = FakeAgent({"/prpc/Tappd.DeriveKey?json": json_answer(KEY)}, unknown)
    async with listening(agent.serve) as address:
        key, chain = await AgentClient(address).get_tls_key(subject="mesh", not_after=1)
    assert (key, chain) == (KEY["key"], KEY["certificate_chain"])
    assert [target for _, target, _, _ in agent.calls] == [
        "/GetTlsKey",
        "/prpc/Tappd.DeriveKey?json",
    ]
    asked = json.loads(agent.calls[1][3])
    assert (asked["subject"], asked["random_seed"]) == ("mesh", True)
    assert asked["usage_server_auth"] is asked["usage_client_auth"] is True
    assert asked["path"]


async def test_an_agent_that_knows_neither_call_is_an_error() -> None:
    async with listening(FakeAgent({}, HTML).serve) as address:
        with pytest.raises(AgentError, match=r"/prpc/Tappd\.DeriveKey: status 404"):
            await AgentClient(address).get_tls_key(subject="mesh", not_after=1)


async def test_info_reads_what_is_there_and_leaves_the_rest() -> None:
    full = {"app_id": "aa" * 20, "instance_id": "cc" * 20, "tcb_info": "{}", "cloud_vendor": ""}
    agent = FakeAgent({"/Info": json_answer(full)}, HTML)
    async with listening(agent.serve) as address:
        info = await AgentClient(address).info()
    assert (info.app_id, info.instance_id, info.compose_hash) == ("aa" * 20, "cc" * 20, "")


async def test_info_of_an_older_agent() -> None:
    agent = FakeAgent({"/prpc/Tappd.Info?json": json_answer({"app_id": "bb" * 20})}, HTML)
    async with listening(agent.serve) as address:
        assert (await AgentClient(address).info()).app_id == "bb" * 20


async def test_a_refusal_is_told_in_the_agents_words() -> None:
    words = "not_before must be earlier than not_after"
    agent = FakeAgent({"/GetTlsKey": refusal(words)}, HTML)
    async with listening(agent.serve) as address:
        with pytest.raises(AgentError) as error:
            await AgentClient(address).get_tls_key(subject="mesh", not_after=1)
    assert error.value.detail == f"guest agent {address}, /GetTlsKey: status 400: {words}"
    assert isinstance(error.value, SourceError)
    assert len(agent.calls) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((500, "text/html", b"<h1>oops</h1>"), "status 500: no reason given"),
        (refusal("x" * 5000), r"status 400: x{300}$"),
        ((200, "application/json", b"{"), "not what is expected"),
        ((200, "application/json", b"[" * 100_000), "not what is expected"),
        ((200, "application/octet-stream", b"\x0a\x05hello"), "not what is expected"),
        (json_answer({"key": 5, "certificate_chain": []}), "not what is expected"),
        (json_answer({"key": "the secret"}), "not what is expected"),
        ((301, "text/plain", b""), "status 301"),
    ],
)
async def test_nonsense_is_an_error_without_what_it_held(answer: Answer, words: str) -> None:
    async with listening(FakeAgent({}, answer).serve) as address:
        with pytest.raises(AgentError, match=words) as error:
            await AgentClient(address).get_tls_key(subject="mesh", not_after=1)
    assert "secret" not in str(error.value)


async def test_an_absent_agent_is_an_error_that_says_where(tmp_path: Path) -> None:
    path = tmp_path / "dstack.sock"
    with pytest.raises(AgentError, match=rf"unix:{path}, /Info: cannot connect .*mounted"):
        await AgentClient(UnixAddress(str(path))).info()
    async with listening(FakeAgent({}, HTML).serve) as address:
        pass
    with pytest.raises(AgentError, match=rf"{address}, /Info: cannot connect .*is it running"):
        await AgentClient(address).info()


@pytest.mark.parametrize("dribble", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"])
async def test_an_agent_that_does_not_finish_is_an_error_in_time(dribble: bytes) -> None:
    gone = asyncio.Event()

    async def dribbling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(dribble)
        await reader.read()  # until the client gives up
        writer.close()
        gone.set()

    async with listening(dribbling) as address:
        client = AgentClient(address, timeout=0.1)
        with pytest.raises(AgentError, match=r"(?i)no answer within 0\.1 s|timeout"):
            await client.info()
        await asyncio.wait_for(gone.wait(), 5)


async def test_an_agent_that_closes_early_is_an_error() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with listening(closing) as address:
        with pytest.raises(AgentError, match=r"/Info: the connection ended before the answer"):
            await AgentClient(address).info()


async def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstack_mesh.dstack.agent._MAX_ANSWER_BYTES", 1000)
    endless = json_answer({"app_id": "a" * 1000})
    async with listening(FakeAgent({"/Info": endless}, HTML).serve) as address:
        with pytest.raises(AgentError, match="its answer is larger than 1000 bytes"):
            await AgentClient(address).info()


async def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    agent = FakeAgent({"/Info": json_answer({"app_id": "aa" * 20})}, HTML)
    async with listening(agent.serve) as address:
        assert (await AgentClient(address).info()).app_id == "aa" * 20


def test_the_key_is_not_in_the_answers_repr() -> None:
    assert "secret" not in repr(TlsKey("secret", []))
