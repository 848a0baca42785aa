"""Which backend a request goes to, by host and path. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from dstack_mesh.model import Address
from dstack_mesh.policy.path import Pattern, normal_path


@dataclass(frozen=True, slots=True)
class Route:
    """A route as it was written: `host` (lower case, no port), `path` (a pattern), or both.

    Raises `ValueError` for one with neither, and for a path that nothing can match.
    """

    backend: Address
    host: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.host and not self.path:
            raise ValueError("it has neither host nor path")
        if self.path is not None:
            Pattern(self.path)


class Routes:
    """The routes in their order: the first that matches decides. Frozen."""

    __slots__ = ("_needs_path", "_rows", "backends", "routes")

    def __init__(self, routes: tuple[Route, ...] = ()) -> None:
        self.routes = routes
        self._rows = [
            (
                None if route.host is None else route.host.encode("ascii"),
                None if route.path is None else Pattern(route.path),
                route.backend,
            )
            for route in routes
        ]
        self.backends = tuple(dict.fromkeys(route.backend for route in routes))
        """The backends, each once."""
        self._needs_path = any(route.path is not None for route in routes)

    def choose(self, host: bytes | None, target: bytes) -> Address | None:
        """Give the backend of a request, or None for the one that takes what no route does.

        `host` is the request's `Host`, with or without a port; None where it has none. Raises
        `PathError` where a route has a path and the target's is not in normal form.
        """
        path = normal_path(target) if self._needs_path else ""
        name = host_name(host) if host is not None else None
        for wanted, pattern, backend in self._rows:
            if wanted is not None and wanted != name:
                continue
            if pattern is None or pattern.matches(path):
                return backend
        return None


NO_ROUTES = Routes()


def host_name(host: bytes) -> bytes:
    """Give a `Host` without its port, in lower case, and without the dot that may end a name."""
    name, colon, port = host.rpartition(b":")
    if colon and (port.isdigit() or not port):
        host = name
    return host.lower().removesuffix(b".")
