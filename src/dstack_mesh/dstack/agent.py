"""A client of the guest agent: keys with certificates, and what the CVM is.

JSON in, JSON out, over the agent's unix socket or TCP; `tests/dstack/test_agent.py` holds the
shapes of a real agent's answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec

from dstack_mesh.identity.source import SourceError
from dstack_mesh.model import UnixAddress
from dstack_mesh.relay.call import CallError, call
from dstack_mesh.relay.dial import reason

if TYPE_CHECKING:
    from dstack_mesh.model import Address

_MAX_ANSWER_BYTES = 8 * 1024 * 1024
_SHOWN_CHARACTERS = 300
_KEY_PATH = "dstack-mesh"

_Answer = TypeVar("_Answer")


class AgentError(SourceError):
    """The guest agent does not answer, refuses, or talks nonsense; `detail` says which.

    It is a `SourceError`, for `identity` asks again after one and may not import this package.
    """


class _NoSuchCallError(AgentError):
    """The agent answers, but does not know the call."""


class TlsKey(msgspec.Struct):
    """The answer to `GetTlsKey` and to the older `DeriveKey`."""

    key: str
    certificate_chain: list[str]

    def __repr__(self) -> str:
        return f"TlsKey({len(self.certificate_chain)} certificates)"


class Info(msgspec.Struct):
    """The answer to `Info`; bytes are hex, and an older agent leaves some of it out."""

    app_id: str
    instance_id: str = ""
    app_name: str = ""
    device_id: str = ""
    compose_hash: str = ""
    os_image_hash: str = ""
    app_cert: str = ""
    tcb_info: str = ""
    key_provider_info: str = ""


class Version(msgspec.Struct):
    """The answer to `Version`."""

    version: str


class _Refusal(msgspec.Struct):
    error: str


class AgentClient:
    """Calls the guest agent at `address`; `timeout` is in seconds, for a whole call.

    Where the agent does not know a call, the older agent's (`tappd`) is tried on the same socket.
    """

    def __init__(self, address: Address, timeout: float = 10.0) -> None:
        self.address = address
        self._timeout = timeout

    async def get_tls_key(self, *, subject: str, not_after: int) -> tuple[str, list[str]]:
        """Return a new private key (PEM) and its chain (PEM, leaf first), good for both roles.

        `not_after` is in seconds since 1970; agents before 0.5.7 ignore it. Raises `AgentError`.
        """
        usages = {"usage_server_auth": True, "usage_client_auth": True}
        try:
            answer = await self._call(
                "/GetTlsKey",
                {"subject": subject, **usages, "not_after": not_after, "with_app_info": True},
                TlsKey,
            )
        except _NoSuchCallError:
            # `random_seed` asks for a new key each time; without it the path decides the key.
            answer = await self._call(
                "/prpc/Tappd.DeriveKey?json",
                {"path": _KEY_PATH, "subject": subject, **usages, "random_seed": True},
                TlsKey,
            )
        return answer.key, answer.certificate_chain

    async def info(self) -> Info:
        """Return what the agent says of this CVM; raises `AgentError`."""
        try:
            return await self._call("/Info", {}, Info)
        except _NoSuchCallError:
            return await self._call("/prpc/Tappd.Info?json", {}, Info)

    async def version(self) -> str | None:
        """Return the agent's version, None for one that is too old to tell; raises `AgentError`."""
        for path in ("/Version", "/prpc/Tappd.Version?json"):
            try:
                return (await self._call(path, {}, Version)).version
            except _NoSuchCallError:
                continue
        return None

    async def aclose(self) -> None:
        """Nothing is kept open between calls; here for callers that close what they opened."""

    async def _call(self, path: str, arguments: dict[str, object], kind: type[_Answer]) -> _Answer:
        try:
            async with asyncio.timeout(self._timeout):
                status, body = await self._post(path, msgspec.json.encode(arguments))
        except TimeoutError:
            raise self._error(path, f"no answer within {self._timeout:g} s") from None
        if status != 200:
            raise self._refusal(path, status, body)
        try:
            return msgspec.json.decode(body, type=kind)
        except (ValueError, RecursionError) as exc:
            raise self._error(path, f"its answer is not what is expected: {exc}") from None

    async def _post(self, path: str, content: bytes) -> tuple[int, bytes]:
        unix = isinstance(self.address, UnixAddress)
        host = "dstack" if unix else str(self.address)
        try:
            return await call(
                self.address, "POST", path, host=host, body=content, limit=_MAX_ANSWER_BYTES
            )
        except CallError as exc:
            raise self._error(path, str(exc)) from exc
        except OSError as exc:
            hint = "is its socket mounted into this container?" if unix else "is it running?"
            raise self._error(path, f"cannot connect ({reason(exc)}): {hint}") from exc

    def _refusal(self, path: str, status: int, body: bytes) -> AgentError:
        try:
            why = msgspec.json.decode(body, type=_Refusal).error
        except (ValueError, RecursionError):
            why = "no reason given"
        unknown = status in (404, 405) or why.startswith("Service not found")
        kind = _NoSuchCallError if unknown else AgentError
        return self._error(path, f"status {status}: {why[:_SHOWN_CHARACTERS]}", kind)

    def _error(self, path: str, what: str, kind: type[AgentError] = AgentError) -> AgentError:
        call = path.partition("?")[0]
        return kind(f"guest agent {self.address}, {call}: {what}")
