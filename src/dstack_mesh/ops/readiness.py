"""Whether the mesh is ready, and if not, why (interface.md, Lifecycle: `/readyz`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypedDict

from dstack_mesh.model import Address, UnixAddress

Check = Callable[[], tuple[bool, str]]
"""Gives (ok, reason); the reason is for the reader in either case, and names no secret."""


class CheckReport(TypedDict):
    """One check's line in the report."""

    ok: bool
    reason: str


class Report(TypedDict):
    """What `/readyz` answers, as JSON."""

    ready: bool
    checks: dict[str, CheckReport]


class Readiness:
    """The checks that decide over `/readyz`, asked anew for each report.

    `gateway` is None where outbound is off and `backend` is None where inbound is off: neither is
    missed then. `draining` tells whether the mesh has begun to stop.
    """

    def __init__(
        self,
        *,
        identity: Check,
        gateway: Check | None,
        backend: Callable[[], Awaitable[tuple[bool, str]]] | None,
        draining: Callable[[], bool],
    ) -> None:
        self._identity = identity
        self._gateway = gateway
        self._backend = backend
        self._draining = draining

    async def report(self, include_backend: bool) -> tuple[bool, Report]:
        """Give (ready, the report); `include_backend` is what `/readyz/inbound` adds.

        The backend is left out of `/readyz`, so that it may wait for the mesh without a deadlock.
        """
        results = {
            "identity": self._identity(),
            "gateway": self._gateway() if self._gateway else (True, "outbound is off"),
        }
        if include_backend:
            results["backend"] = (
                await self._backend() if self._backend else (True, "inbound is off")
            )
        if self._draining():
            results["draining"] = (False, "the mesh is stopping")
        checks = {name: CheckReport(ok=ok, reason=reason) for name, (ok, reason) in results.items()}
        ready = all(check["ok"] for check in checks.values())
        return ready, Report(ready=ready, checks=checks)


async def backend_answers(
    address: Address,
    timeout: float = 1.0,  # noqa: ASYNC109 - the callee has to tell its own time from the caller's
) -> tuple[bool, str]:
    """Open a connection to `address` and close it; `timeout` in seconds. Gives (ok, reason)."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            if isinstance(address, UnixAddress):
                transport, _ = await loop.create_unix_connection(asyncio.Protocol, address.path)
            else:
                transport, _ = await loop.create_connection(
                    asyncio.Protocol, address.host, address.port
                )
    except TimeoutError:
        return False, f"{address} does not answer within {timeout:g} s"
    except (OSError, ValueError) as error:
        # ValueError: a host name that can't be encoded, a path with a null byte.
        return False, f"{address} does not answer: {_why(error)}"
    transport.abort()
    return True, f"{address} answers"


async def backends_answer(addresses: Iterable[Address]) -> tuple[bool, str]:
    """Ask all of `addresses` at once, each of them once. Gives (all do, each with its reason)."""
    found = await asyncio.gather(*map(backend_answers, dict.fromkeys(addresses)))
    return all(ok for ok, _ in found), "; ".join(reason for _, reason in found)


def _why(error: Exception) -> str:
    """Say it without the address again, which asyncio and uvloop put in in different forms."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
