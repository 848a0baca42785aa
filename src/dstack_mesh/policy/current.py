"""What policy and routes are in effect: read for each request, exchanged while running."""

from __future__ import annotations

from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.route import NO_ROUTES, Routes


class Current:
    """Holds the policy and the routes in effect. Whoever decides reads them here, each time."""

    __slots__ = ("policy", "routes")

    def __init__(self, policy: Policy, routes: Routes = NO_ROUTES) -> None:
        self.policy = policy
        self.routes = routes

    def replace(self, policy: Policy, routes: Routes) -> None:
        """Put others in their place, for every request from the next one on.

        No request is between the two: all of one is decided in one step of the event loop.
        """
        self.policy, self.routes = policy, routes
