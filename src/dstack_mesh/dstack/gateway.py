"""Where the gateway is: set by hand, or asked of the gateways that this CVM was told of.

protocol.md, Gateway: `.sys-config.json` lists base URLs, and `GET {url}/prpc/Info` on one of them
tells the base domain and the port. interface.md, Outbound, says when to ask again.
"""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import msgspec

from dstack_mesh.errors import GatewayUnknown
from dstack_mesh.gateway_domain import Gateway, GatewayDomain, normalise_base_domain
from dstack_mesh.log import event
from dstack_mesh.model import TcpAddress
from dstack_mesh.relay.call import CallError, call
from dstack_mesh.relay.dial import reason

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

REFRESH = 300.0
"""Seconds between two look-ups, give or take a fifth."""

MIN_GAP = 5.0
"""Seconds at least between the starts of two look-ups when connections to the gateway fail."""

FIRST_RETRY, LAST_RETRY = 1.0, 30.0
"""Seconds to the next look-up while none has succeeded yet: doubling, up to a fifth less."""

ASK_TIMEOUT = 5.0
"""Seconds that one URL has for its whole answer."""

_MAX_ANSWER = 64 * 1024
_MAX_SYS_CONFIG = 1024 * 1024


class GatewayLookupError(Exception):
    """Why a look-up, or one URL of it, gave no gateway. Its text is for the reader."""


class _SysConfig(msgspec.Struct):
    gateway_urls: list[str] | None = None
    tproxy_urls: list[str] | None = None


class _Info(msgspec.Struct):
    base_domain: str
    external_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


Ask = Callable[[str], Awaitable[GatewayDomain]]


def gateway_urls(path: Path) -> list[str]:
    """Read the gateways' base URLs from `.sys-config.json`; never empty.

    Raises `GatewayLookupError` where the file is missing, is not what protocol.md says, or names
    no gateway.
    """
    hint = "set MESH_GATEWAY (base.domain[:port]) or MESH_SYS_CONFIG"
    try:
        # Anything else than a file could block the event loop: a pipe waits for its writer.
        if path.exists() and not path.is_file():
            raise GatewayLookupError(f"{path} is not a file: {hint}")
        with path.open("rb") as file:
            text = file.read(_MAX_SYS_CONFIG + 1)
    except OSError as error:
        raise GatewayLookupError(f"cannot read {path}: {error.strerror}: {hint}") from error
    if len(text) > _MAX_SYS_CONFIG:
        raise GatewayLookupError(f"{path} is larger than {_MAX_SYS_CONFIG} bytes")
    try:
        config = msgspec.json.decode(text, type=_SysConfig)
    except (ValueError, RecursionError) as error:
        raise GatewayLookupError(f"{path} is not a dstack system configuration: {error}") from error
    urls = config.gateway_urls or config.tproxy_urls
    if not urls:
        raise GatewayLookupError(f"{path} has no gateway_urls (or tproxy_urls): {hint}")
    return urls


def read_info(answer: bytes) -> GatewayDomain:
    """Read the answer to `/prpc/Info`. Raises `GatewayLookupError` for anything not usable."""
    try:
        info = msgspec.json.decode(answer, type=_Info)
        return GatewayDomain(normalise_base_domain(info.base_domain), info.external_port)
    except (ValueError, RecursionError) as error:
        raise GatewayLookupError(f"its answer is not usable: {error}") from error


async def ask(url: str) -> GatewayDomain:
    """Ask the gateway at base URL `url` for its domain. Raises `GatewayLookupError`."""
    try:
        async with asyncio.timeout(ASK_TIMEOUT):
            return read_info(await _get(f"{url.rstrip('/')}/prpc/Info"))
    except TimeoutError as error:
        raise GatewayLookupError(f"no answer within {ASK_TIMEOUT:g} s") from error
    except (CallError, ValueError) as error:  # ValueError: a host that is no name, a wild port
        raise GatewayLookupError(str(error)) from error
    except OSError as error:
        raise GatewayLookupError(f"{type(error).__name__}: {reason(error)}") from error


async def _get(url: str) -> bytes:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise GatewayLookupError("not an http or https URL")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise GatewayLookupError("not a URL: it has characters that would need encoding")
    tls = _unverified() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    status, body = await call(
        TcpAddress(parts.hostname, port),
        "GET",
        target,
        host=parts.hostname if tls else parts.netloc.rpartition("@")[2],
        limit=_MAX_ANSWER,
        tls=tls,
    )
    if status != 200:
        raise GatewayLookupError(f"it answered with status {status}")
    return body


def _unverified() -> ssl.SSLContext:
    """Make a client context that takes any certificate.

    The gateway's own certificate can't be verified from inside a CVM, and need not be: all that a
    false answer can do is send a connection elsewhere, and nothing of a request is sent there
    before the other end has proved that it is the target.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class GatewayDirectory:
    """The gateway in effect. `run` keeps it current; the last good answer stays.

    `ask`, `clock` (monotonic seconds), `random` (0 to 1) and `sleep` are for tests.
    """

    current: Gateway | None
    """None while it is not known; then `reason` says why."""

    reason: str | None

    def __init__(
        self,
        *,
        configured: Gateway | None,
        sys_config: Path,
        ask: Ask = ask,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.current = configured
        self.reason = None if configured else "no gateway has been asked yet"
        self.is_configured = configured is not None
        """Whether the gateway was set by hand, so that nobody is asked."""
        self._sys_config = sys_config
        self._ask = ask
        self._clock = clock
        self._random = random
        self._sleep = sleep
        self._subscribers: list[Callable[[Gateway], None]] = []
        self._ask_again = asyncio.Event()

    @property
    def text(self) -> str | None:
        """What `/gateway` answers: the setting's text, or the discovered domain."""
        return self.current.text if self.current else None

    def require(self) -> Gateway:
        """Give the gateway; raises `GatewayUnknown` with the reason while there is none."""
        if self.current is None:
            raise GatewayUnknown(f"the gateway's domain is not known yet: {self.reason}")
        return self.current

    def subscribe(self, callback: Callable[[Gateway], None]) -> None:
        """Have `callback` called with each newly found gateway; it must not raise."""
        self._subscribers.append(callback)

    def connection_failed(self) -> None:
        """Tell that a connection to the gateway failed: it is asked for again now.

        Cheap, and safe to call for every failure: look-ups start at most every `MIN_GAP` seconds.
        """
        self._ask_again.set()

    async def run(self) -> None:
        """Look the gateway up until cancelled; return at once where it is set by hand."""
        if self.is_configured:
            return
        retry = FIRST_RETRY
        while True:
            self._ask_again.clear()
            started = self._clock()
            await self._look_up()
            if self.current is None:
                await self._sleep(retry * (1 - 0.2 * self._random()))
                retry = min(2 * retry, LAST_RETRY)
            else:
                await self._sleep_unless_asked(REFRESH * (0.8 + 0.4 * self._random()))
                await self._sleep(max(0.0, started + MIN_GAP - self._clock()))

    async def _look_up(self) -> None:
        try:
            urls = gateway_urls(self._sys_config)
        except GatewayLookupError as error:
            self._failed(str(error))
            return
        reasons = []
        for url in urls:
            if "@" in url:
                # Not shown: what is in it would end in logs and answers.
                reasons.append("a URL with credentials, which is not asked")
                continue
            try:
                found = await self._ask(url)
            except GatewayLookupError as error:
                reasons.append(f"{url}: {error}")
            else:
                self._found(found, url)
                return
        self._failed("; ".join(reasons))

    def _found(self, found: GatewayDomain, url: str) -> None:
        before = self.current
        if before == found:
            return  # and the same object stays: what is made from it is kept by its identity
        self.current, self.reason = found, None
        if before is None:
            event(logger, logging.INFO, "gateway_discovered", gateway=found.text, url=url)
        else:
            event(
                logger,
                logging.INFO,
                "gateway_changed",
                gateway=found.text,
                before=before.text,
                url=url,
            )
        for callback in self._subscribers:
            callback(found)

    def _failed(self, reason: str) -> None:
        if self.current is None:
            self.reason = reason
        event(logger, logging.WARNING, "gateway_lookup_failed", reason=reason, kept=self.text)

    async def _sleep_unless_asked(self, seconds: float) -> None:
        timer = asyncio.ensure_future(self._sleep(seconds))
        asked = asyncio.ensure_future(self._ask_again.wait())
        try:
            await asyncio.wait((timer, asked), return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            asked.cancel()
