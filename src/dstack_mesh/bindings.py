"""Which listeners a sidecar has, by its settings, and the sockets of all of them."""

from __future__ import annotations

from collections.abc import Mapping

from dstack_mesh import listen
from dstack_mesh.settings.tree import Settings


def bind_all(settings: Settings, sockets: dict[str, listen.ListeningSocket]) -> None:
    """Bind every listener that the settings ask for, into `sockets`. Raises `ListenError`."""
    inbound = settings.inbound
    addresses = {"outbound": settings.outbound.listen, "admin": settings.admin.listen}
    if inbound.mode == "embedded" and inbound.backend is not None:
        addresses["inbound"] = inbound.listen
    if inbound.mode == "nginx":
        addresses["auth"] = inbound.auth_listen
    for name, address in addresses.items():
        if address is not None:
            sockets[name] = listen.bind(address)


def bound_addresses(sockets: Mapping[str, listen.ListeningSocket]) -> dict[str, str | None]:
    """Give the addresses actually bound, by listener; None for one that is off."""
    return {
        name: str(listen.bound_address(sockets[name])) if name in sockets else None
        for name in ("outbound", "inbound", "auth", "admin")
    }
