from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.dstack import gateway
from dstack_mesh.dstack.gateway import (
    GatewayDirectory,
    GatewayLookupError,
    ask,
    gateway_urls,
    read_info,
)
from dstack_mesh.errors import GatewayUnknown
from dstack_mesh.gateway_domain import FixedGateway, GatewayDomain
from dstack_mesh.model import TcpAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

DOMAIN = GatewayDomain("apps.example.org")
OTHER = GatewayDomain("other.example.org", 9443)


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


class Time:
    """A clock that moves only when told to, and the sleeps that wait for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeping: dict[asyncio.Future[None], float] = {}

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        self.sleeping[done] = self.now + seconds
        try:
            await done
        finally:
            del self.sleeping[done]

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def move(self, seconds: float) -> None:
        await self.settle()
        until = self.now + seconds
        while due := [at for at in self.sleeping.values() if at <= until]:
            self.now = min(due)
            for done, at in list(self.sleeping.items()):
                if at <= self.now:
                    done.set_result(None)
            await self.settle()
        self.now = until


class Gateways:
    """Gateways by URL: what each answers, and who was asked when."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.answers: dict[str, GatewayDomain | str] = {}
        self.asked: list[tuple[float, str]] = []

    async def ask(self, url: str) -> GatewayDomain:
        self.asked.append((self.time.now, url))
        answer = self.answers.get(url, "refused")
        if isinstance(answer, str):
            raise GatewayLookupError(answer)
        return answer


@contextlib.asynccontextmanager
async def running(
    sys_config: Path, random: Callable[[], float] = lambda: 0.5
) -> AsyncIterator[tuple[GatewayDirectory, Gateways, Time]]:
    time = Time()
    gateways = Gateways(time)
    directory = GatewayDirectory(
        configured=None,
        sys_config=sys_config,
        ask=gateways.ask,
        clock=time.clock,
        random=random,
        sleep=time.sleep,
    )
    task = asyncio.create_task(directory.run())
    try:
        yield directory, gateways, time
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await time.settle()
        assert not time.sleeping


@pytest.fixture
def sys_config(tmp_path: Path) -> Path:
    return write(tmp_path / "sys-config.json", {"gateway_urls": ["https://one", "https://two"]})


# What is set by hand


async def test_a_configured_gateway_is_in_effect_at_once_and_run_returns() -> None:
    fixed = FixedGateway(TcpAddress("127.0.0.1", 8443), "fixed/127.0.0.1:8443")
    directory = GatewayDirectory(configured=fixed, sys_config=Path("/nonexistent"))
    await directory.run()
    directory.connection_failed()
    assert directory.require() is fixed
    assert directory.current is fixed
    assert directory.reason is None
    assert directory.text == "fixed/127.0.0.1:8443"


# Discovery


async def test_before_the_first_answer_the_reason_says_so(tmp_path: Path) -> None:
    directory = GatewayDirectory(configured=None, sys_config=tmp_path / "missing")
    assert directory.text is None
    with pytest.raises(GatewayUnknown, match="no gateway has been asked yet"):
        directory.require()


async def test_the_next_url_is_asked_when_one_fails(
    sys_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(sys_config) as (directory, gateways, time):
        gateways.answers["https://two"] = OTHER
        found: list[object] = []
        directory.subscribe(found.append)
        await time.settle()
        assert directory.require() == OTHER
        assert directory.reason is None
        assert directory.text == "other.example.org:9443"
        assert found == [OTHER]
        assert gateways.asked == [(0.0, "https://one"), (0.0, "https://two")]
    assert [record.message for record in caplog.records] == ["gateway_discovered"]


async def test_while_there_is_none_the_pause_doubles_to_half_a_minute(sys_config: Path) -> None:
    async with running(sys_config, random=lambda: 0.0) as (directory, gateways, time):
        await time.move(95)
        starts = [at for at, url in gateways.asked if url == "https://one"]
        assert starts == [0, 1, 3, 7, 15, 31, 61, 91]
        with pytest.raises(GatewayUnknown, match="https://one: refused; https://two: refused"):
            directory.require()
        gateways.answers["https://one"] = DOMAIN
        await time.move(30)
        assert directory.require() == DOMAIN


async def test_the_pause_is_up_to_a_fifth_less(sys_config: Path) -> None:
    async with running(sys_config, random=lambda: 1.0) as (_, gateways, time):
        await time.move(1)
        assert [at for at, url in gateways.asked if url == "https://one"] == [0, 0.8]


async def test_failed_connections_do_not_hurry_the_first_answer(sys_config: Path) -> None:
    async with running(sys_config) as (directory, gateways, time):
        await time.settle()
        directory.connection_failed()
        await time.settle()
        assert len(gateways.asked) == 2


async def test_the_files_absence_is_the_reason_until_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "sys-config.json"
    async with running(path) as (directory, gateways, time):
        gateways.answers["https://old"] = DOMAIN
        await time.settle()
        assert directory.reason is not None
        assert (
            f"cannot read {path}: No such file or directory: set MESH_GATEWAY" in directory.reason
        )
        write(path, {"tproxy_urls": ["https://old"]})
        await time.move(2)
        assert directory.require() == DOMAIN
        assert directory.reason is None


@pytest.mark.parametrize(("random", "pause"), [(0.0, 240), (0.5, 300), (1.0, 360)])
async def test_it_is_asked_again_every_five_minutes_give_or_take_a_fifth(
    sys_config: Path, random: float, pause: float
) -> None:
    async with running(sys_config, random=lambda: random) as (directory, gateways, time):
        gateways.answers["https://one"] = DOMAIN
        await time.move(pause - 1)
        assert len(gateways.asked) == 1
        gateways.answers["https://one"] = OTHER
        await time.move(2)
        assert [at for at, _ in gateways.asked] == pytest.approx([0, pause])
        assert directory.current == OTHER


async def test_the_last_good_answer_stays(
    sys_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(sys_config) as (directory, gateways, time):
        gateways.answers["https://one"] = DOMAIN
        found: list[object] = []
        directory.subscribe(found.append)
        await time.move(1)
        gateways.answers["https://one"] = "gone"
        await time.move(300)
        assert directory.require() == DOMAIN
        assert directory.reason is None
        sys_config.unlink()  # noqa: ASYNC240 - nothing else is waiting
        await time.move(300)
        assert directory.require() == DOMAIN
        assert found == [DOMAIN]
    lost = [record.__dict__["fields"] for record in caplog.records]
    assert lost[0] == {
        "reason": "https://one: gone; https://two: refused",
        "kept": "apps.example.org",
    }


async def test_a_change_is_told_and_the_same_answer_is_not(
    sys_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(sys_config) as (directory, gateways, time):
        gateways.answers["https://one"] = DOMAIN
        found: list[object] = []
        directory.subscribe(found.append)
        await time.move(1)
        gateways.answers["https://one"] = GatewayDomain(DOMAIN.base_domain)
        await time.move(300)
        assert len(gateways.asked) == 2
        assert directory.current is DOMAIN
        gateways.answers["https://one"] = OTHER
        await time.move(300)
        assert found == [DOMAIN, OTHER]
    assert [record.message for record in caplog.records] == [
        "gateway_discovered",
        "gateway_changed",
    ]


async def test_failed_connections_ask_at_once_and_at_most_every_five_seconds(
    sys_config: Path,
) -> None:
    async with running(sys_config) as (directory, gateways, time):
        gateways.answers["https://one"] = DOMAIN
        await time.move(60)
        for _ in range(240):  # four a second, for a minute
            directory.connection_failed()
            await time.move(0.25)
        starts = [at for at, _ in gateways.asked]
        assert starts == [0, *range(60, 121, 5)]


async def test_a_failure_soon_after_a_look_up_is_not_forgotten(sys_config: Path) -> None:
    async with running(sys_config) as (directory, gateways, time):
        gateways.answers["https://one"] = DOMAIN
        await time.move(1)
        directory.connection_failed()
        await time.move(3)
        assert len(gateways.asked) == 1
        await time.move(100)
        assert [at for at, _ in gateways.asked] == [0, 5]


async def test_credentials_in_a_url_are_neither_sent_nor_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", {"gateway_urls": ["https://user:secret@one", "https://two"]})
    async with running(path) as (directory, gateways, time):
        await time.settle()
        assert gateways.asked == [(0.0, "https://two")]
        assert (
            directory.reason == "a URL with credentials, which is not asked; https://two: refused"
        )


# .sys-config.json


@pytest.mark.parametrize(
    ("config", "urls"),
    [
        ({"gateway_urls": ["a", "b"], "other": [1, {}]}, ["a", "b"]),
        ({"gateway_urls": ["a"], "tproxy_urls": ["b"]}, ["a"]),
        ({"gateway_urls": [], "tproxy_urls": ["b"]}, ["b"]),
        ({"gateway_urls": None, "tproxy_urls": ["b"]}, ["b"]),
    ],
)
def test_the_urls_of_a_sys_config(tmp_path: Path, config: object, urls: list[str]) -> None:
    assert gateway_urls(write(tmp_path / "c.json", config)) == urls


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is not a dstack system configuration: Input data was truncated"),
        (b"{", "is not a dstack system configuration"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff", "is not a dstack system configuration"),
        (b'{"gateway_urls": "https://one"}', "Expected `array | null`, got `str`"),
        (b'{"gateway_urls": [1]}', "Expected `str`, got `int`"),
        (b'{"x": ' + b"[" * 100_000, "is not a dstack system configuration"),
        (b"{}", r"has no gateway_urls \(or tproxy_urls\): set MESH_GATEWAY"),
        (b'{"gateway_urls": []}', "has no gateway_urls"),
        (b" " * 2_000_000, "is larger than 1048576 bytes"),
    ],
)
def test_a_sys_config_of_no_use(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(GatewayLookupError, match=says) as refused:
        gateway_urls(path)
    assert str(path) in str(refused.value)


def test_a_folder_is_no_sys_config(tmp_path: Path) -> None:
    with pytest.raises(GatewayLookupError, match="is not a file: set MESH_GATEWAY"):
        gateway_urls(tmp_path)


# /prpc/Info


def test_a_gateways_answer() -> None:
    answer = b'{"base_domain":"Apps.Example.Org.","external_port":8443,"app_address_ns_prefix":""}'
    assert read_info(answer) == GatewayDomain("apps.example.org", 8443)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "not usable: Input data was truncated"),
        (b"<html>", "not usable: JSON is malformed"),
        (b"null", "Expected `object`, got `null`"),
        (b"{}", "missing required field `base_domain`"),
        (b'{"base_domain":"a.example"}', "missing required field `external_port`"),
        (b'{"base_domain":5,"external_port":1}', "Expected `str`, got `int`"),
        (b'{"base_domain":"a.example","external_port":"443"}', "Expected `int`, got `str`"),
        (b'{"base_domain":"a.example","external_port":true}', "Expected `int`, got `bool`"),
        (b'{"base_domain":"a.example","external_port":0}', "Expected `int` >= 1"),
        (b'{"base_domain":"a.example","external_port":65536}', "Expected `int` <= 65535"),
        (b'{"base_domain":"a.example","external_port":1' + b"0" * 40 + b"}", "not usable"),
        (b'{"base_domain":"","external_port":443}', "'' is not a domain name"),
        (b'{"base_domain":"a/../b","external_port":443}', "'a/../b' is not a domain name"),
        (b'{"base_domain":"a.example:1","external_port":443}', "is not a domain name"),
        (b'{"base_domain":"\xff","external_port":443}', "not usable"),
        (b'{"x":' + b"[" * 60_000, "not usable"),
    ],
)
def test_an_answer_of_no_use(answer: bytes, says: str) -> None:
    with pytest.raises(GatewayLookupError, match=says):
        read_info(answer)


# Over real connections

INFO = b'{"base_domain":"apps.example.org","external_port":443}'


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server context as a gateway's: a certificate for no name, long expired, by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    then = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(then)
        .not_valid_after(then + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@contextlib.asynccontextmanager
async def serving(answer: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A gateway that answers each request with `answer` and closes; empty: never answers."""
    heads: list[bytes] = []
    tasks: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            if answer:
                writer.write(answer)
                await writer.drain()
            else:
                await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    async with asyncio.timeout(10):
        await asyncio.gather(*(task for task in tasks if task))
    for head in heads:
        assert head.startswith(b"GET /prpc/Info HTTP/1.1\r\n")


def http(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + length + more + b"\r\n" + body


async def test_a_gateways_own_certificate_is_not_judged(tmp_path: Path) -> None:
    async with serving(http(INFO), self_signed(tmp_path)) as url:
        assert await ask(url) == DOMAIN


async def test_plain_http_and_a_slash_at_the_end() -> None:
    async with serving(http(INFO)) as url:
        assert await ask(f"{url}/") == DOMAIN


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"", b"302 Found", b"location: http://127.0.0.1:1/\r\n"), "status 302"),
        (http(INFO, b"500 Oops"), "status 500"),
        (http(b"x" * 100_000), "larger than 65536 bytes"),
        (http(b"nonsense"), "not usable: JSON is malformed"),
        (http(INFO)[:-5], "ended before the answer was complete"),
        (b"nonsense\r\n\r\n", "."),
        (b"HTTP/1.1 200 OK\r\n", "."),
    ],
)
async def test_answers_that_fail(answer: bytes, says: str) -> None:
    async with serving(answer) as url:
        with pytest.raises(GatewayLookupError, match=says):
            await ask(url)


async def test_an_endless_answer_is_bounded() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(head + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 64) as url:
        with pytest.raises(GatewayLookupError, match="larger than 65536 bytes"):
            await ask(url)


async def test_silence_is_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "ASK_TIMEOUT", 0.05)
    async with serving(b"") as url:
        with pytest.raises(GatewayLookupError, match=r"no answer within 0\.05 s"):
            await ask(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1", "."),
        ("https://127.0.0.1:1", "."),
        ("", "not an http or https URL"),
        ("gateway.example.org", "not an http or https URL"),
        ("file:///etc/passwd", "not an http or https URL"),
        ("http://[bad", "Invalid IPv6 URL"),
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://127.0.0.1:0", "not an http or https URL"),
        ("http://a b/", "."),
        ("http://\x00/", "."),
        ("http://" + "a" * 70 + "/", "."),
    ],
)
async def test_urls_that_cannot_be_asked(url: str, says: str) -> None:
    with pytest.raises(GatewayLookupError, match=says):
        await ask(url)


async def test_a_directory_over_real_connections(tmp_path: Path) -> None:
    async with serving(http(INFO), self_signed(tmp_path)) as url:
        path = write(tmp_path / "c.json", {"gateway_urls": ["http://127.0.0.1:1", url]})
        directory = GatewayDirectory(configured=None, sys_config=path)
        known = asyncio.Event()
        directory.subscribe(lambda _: known.set())
        task = asyncio.create_task(directory.run())
        async with asyncio.timeout(10):
            await known.wait()
        assert directory.require() == DOMAIN
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
