"""The gateway: known, found by name, and reached."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dstack_mesh.check.result import Group, Result, failed, ok, skipped
from dstack_mesh.dstack import gateway as directory
from dstack_mesh.dstack.gateway import GatewayLookupError
from dstack_mesh.errors import BadTarget
from dstack_mesh.gateway_domain import Gateway
from dstack_mesh.model import AppId, Target, TcpAddress
from dstack_mesh.outbound.target import endpoint
from dstack_mesh.relay.dial import open_socket, reason
from dstack_mesh.settings.tree import Settings

NAME, RESOLVES, CONNECTS = (
    "the gateway's domain is known",
    "a target's name resolves",
    "it takes a connection",
)
_NOBODY = AppId("0" * 40)


class GatewayChecks:
    """Looks the gateway up as the mesh does."""

    def __init__(self, settings: Settings) -> None:
        self.gateway: Gateway | None = None
        """Where targets are reached, where the checks found that."""

        self._settings = settings

    async def run(self, own: AppId | None) -> Group:
        """Look at it; `own` stands for a target in the name that has to resolve."""
        if self._settings.outbound.listen is None:
            return Group("gateway", (skipped(NAME, "outbound is off"),))
        known = await self._known()
        if self.gateway is None:
            return Group(
                "gateway",
                (known, skipped(RESOLVES, "no domain"), skipped(CONNECTS, "no domain")),
            )
        target = Target(own or _NOBODY, self._settings.outbound.default_port)
        try:
            where = endpoint(target, self.gateway, self._settings.dstack.gateway_connect).connect
        except BadTarget as error:
            return Group("gateway", (known, failed(RESOLVES, error.detail, "correct the domain")))
        found = await resolves(where)
        reached = (
            await connects(where, self._settings.outbound.connect_timeout)
            if found.status == "ok"
            else skipped(CONNECTS, "the name does not resolve")
        )
        return Group("gateway", (known, found, reached))

    async def _known(self) -> Result:
        dstack = self._settings.dstack
        if dstack.gateway_domain is not None:
            self.gateway = dstack.gateway_domain
            return ok(NAME, f"{self.gateway.text} (MESH_GATEWAY)")
        remedy = "set MESH_GATEWAY=base.domain[:port], or mount the system configuration"
        try:
            urls = directory.gateway_urls(Path(dstack.sys_config))
        except GatewayLookupError as error:
            return failed(NAME, str(error), remedy)
        reasons = []
        for url in urls:
            if "@" in url:  # not shown: what is in it would end in logs
                reasons.append("a URL with credentials, which is not asked")
                continue
            try:
                self.gateway = await directory.ask(url)
            except GatewayLookupError as error:
                reasons.append(f"{url}: {error}")
            else:
                return ok(NAME, f"{self.gateway.text}, by {url}")
        return failed(NAME, "; ".join(reasons), "is the gateway up? or set MESH_GATEWAY")


async def resolves(where: TcpAddress, name: str = RESOLVES) -> Result:
    """Look the name of `where` up."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(5):
            found = await loop.getaddrinfo(where.host, where.port)
    except (OSError, UnicodeError, TimeoutError) as error:
        why = "no answer within 5 s" if isinstance(error, TimeoutError) else reason(error)
        remedy = "look at this machine's DNS; MESH_GATEWAY_CONNECT=host:port does without a name"
        return failed(name, f"{where.host}: {why}", remedy)
    addresses = sorted({str(one[4][0]) for one in found})
    return ok(name, f"{where.host} is {', '.join(addresses)}")


async def connects(where: TcpAddress, seconds: float, name: str = CONNECTS) -> Result:
    """Open a TCP connection to `where`, and close it."""
    try:
        async with asyncio.timeout(seconds):
            sock = await open_socket(asyncio.get_running_loop(), where)
    except (OSError, TimeoutError) as error:
        late = f"no answer within {seconds:g} s"
        why = late if isinstance(error, TimeoutError) and not error.errno else reason(error)
        remedy = "look at routes and firewalls between this CVM and the gateway"
        return failed(name, f"{where}: {why}", remedy)
    sock.close()
    return ok(name, str(where))
