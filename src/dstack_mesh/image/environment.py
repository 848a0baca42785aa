"""The environment that the sidecar gets in the image: the image's defaults, and older names.

The image's defaults are defaults: a flag, a variable or a file beats them. They are handed to the
sidecar as variables only where nothing else says anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dstack_mesh.image.layout import AUTH_SOCKET
from dstack_mesh.settings.schema import BY_ENV, BY_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dstack_mesh.settings.load import Source

DEFAULTS = {
    "outbound.listen": "0.0.0.0:80",
    "inbound.listen": "0.0.0.0:443",
    "inbound.auth_listen": f"unix:{AUTH_SOCKET}",
}

OLDER_NAMES = {"BACKEND": "MESH_BACKEND", "GATEWAY_DOMAIN": "MESH_GATEWAY"}
"""Names that the Rust mesh's first image had, too plain to be read anywhere but in an image."""


def with_older_names(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the environment with the values of `OLDER_NAMES` under today's, unless these are set."""
    found = dict(environ)
    for old, new in OLDER_NAMES.items():
        value = found.pop(old, "")
        if value and not any(found.get(name) for name in BY_ENV[new].env):
            found[new] = value
    return found


def with_defaults(environ: Mapping[str, str], sources: Mapping[str, Source]) -> dict[str, str]:
    """Give the environment with the image's defaults for what came from no source."""
    found = dict(environ)
    for key, text in DEFAULTS.items():
        if sources[key].kind == "default":
            found[BY_KEY[key].env[0]] = text
    return found
