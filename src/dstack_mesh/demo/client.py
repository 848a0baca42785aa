"""The client of the demo: what an application would send to its sidecar, with any HTTP library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from types import TracebackType

TIMEOUT_SECONDS = 20.0


class ClientError(OSError):
    """No answer came; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    error: str
    """The mesh's own error code (`x-dstack-mesh-error`), or empty."""

    body: bytes

    def json(self) -> Any:
        """Decode the body. Raises `ValueError`."""
        return json.loads(self.body)

    def field(self, name: str) -> str:
        """Give the text at `name` of a JSON body; empty where there is none."""
        try:
            found = self.json()
        except ValueError:
            return ""
        return str(found.get(name, "")) if isinstance(found, dict) else ""

    def __str__(self) -> str:
        return f"{self.status} {self.error}".rstrip()


class Client:
    """Use as `async with Client() as client`. Everything raises `ClientError`."""

    def __init__(self) -> None:
        # trust_env: a proxy named in the environment has no business with loopback.
        self._http = httpx2.AsyncClient(trust_env=False, timeout=TIMEOUT_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, url: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Send a GET and read the answer."""
        return await self._request("GET", url, headers, None)

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes | AsyncIterator[bytes]
    ) -> Answer:
        """Send a POST, its body as it comes, and read the answer."""
        return await self._request("POST", url, headers, body)

    async def lines(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[str]:
        """Give the lines of a response as they arrive, if its status is 200."""
        try:
            async with self._http.stream("GET", url, headers=dict(headers)) as response:
                if response.status_code != 200:
                    raise ClientError(f"the answer was {response.status_code}")
                async for line in response.aiter_lines():
                    yield line
        except httpx2.HTTPError as error:
            raise ClientError(_reason(error)) from error

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        body: bytes | AsyncIterator[bytes] | None,
    ) -> Answer:
        try:
            response = await self._http.request(
                method, url, headers=dict(headers or {}), content=body
            )
        except httpx2.HTTPError as error:
            raise ClientError(_reason(error)) from error
        code = response.headers.get("x-dstack-mesh-error", "")
        return Answer(response.status_code, code, response.content)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
