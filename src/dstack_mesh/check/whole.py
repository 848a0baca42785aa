"""All checks in their order: what one finds, those after it go on with."""

from __future__ import annotations

import time
from collections.abc import Callable

from dstack_mesh.check.gateway import GatewayChecks
from dstack_mesh.check.identity import IdentityChecks
from dstack_mesh.check.local import LocalChecks, settings_group
from dstack_mesh.check.result import Group
from dstack_mesh.check.target import check_target
from dstack_mesh.model import Target
from dstack_mesh.settings.load import Loaded


async def check(
    loaded: Loaded, target: Target | None, clock: Callable[[], float] = time.time
) -> list[Group]:
    """Look at everything once; with a `target`, at the way to it too. Raises nothing."""
    settings = loaded.settings
    identity = IdentityChecks(settings, clock)
    groups = [settings_group(loaded), await identity.agent(), await identity.identity()]
    snapshot = identity.snapshot
    gateway = GatewayChecks(settings)
    groups.append(await gateway.run(snapshot.app_id if snapshot is not None else None))
    local = LocalChecks(settings, snapshot, clock)
    groups += [
        await local.listeners(),
        await local.sidecar(),
        await local.backend(),
        local.files(),
    ]
    if target is not None:
        groups.append(await check_target(target, settings, snapshot, gateway.gateway))
    return groups
