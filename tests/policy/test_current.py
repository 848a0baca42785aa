from __future__ import annotations

from dstack_mesh.model import TcpAddress
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.current import Current
from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.route import NO_ROUTES, Route, Routes


def test_policy_and_routes_are_exchanged_together() -> None:
    first, second = Policy(Allow()), Policy(Allow(anyone=True))
    current = Current(first)
    assert (current.policy, current.routes) == (first, NO_ROUTES)
    routes = Routes((Route(TcpAddress("a", 1), host="a"),))
    current.replace(second, routes)
    assert (current.policy, current.routes) == (second, routes)
