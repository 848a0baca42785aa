"""Policy and routes as settings say, made ready: the same for `run`, a reload and `explain`."""

from __future__ import annotations

from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.route import NO_ROUTES, Routes
from dstack_mesh.settings.tree import InboundSettings


def compile_inbound(inbound: InboundSettings) -> tuple[Policy, Routes]:
    """Give what `policy.current.Current` takes: `current.replace(*compile_inbound(…))`."""
    policy = Policy(inbound.allow, inbound.rules, audit=inbound.policy_mode == "audit")
    return policy, Routes(inbound.routes) if inbound.routes else NO_ROUTES
