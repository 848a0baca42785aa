"""`docs/settings.md`, written from the table: `python -m dstack_mesh.settings.docs > FILE`."""

from __future__ import annotations

import sys

from dstack_mesh.settings import rules
from dstack_mesh.settings.render import as_markdown
from dstack_mesh.settings.schema import SCHEMA

_HEAD = """\
<!-- Made by `python -m dstack_mesh.settings.docs`; a test holds it true. -->
# Settings

The command line beats the environment, which beats the TOML file (`-c FILE`), which beats the
default. `dstack-mesh config` prints the settings in effect as a TOML file, each with its source.

A bad value, an unknown key in the file, or settings that do not go together stop the start with
exit status 2 and one line that names the key, the value and what is accepted. An unknown `MESH_…`
variable is a warning that names the nearest known one. Where a setting has two variables, the first
wins.

An empty variable (`MESH_GATEWAY=`) counts as not set, since that is how compose files hand in what
was not filled in. Not so for {restricting}:
these say who may do what, and by default everybody may, so an empty value is an error there. An
empty flag is an error everywhere, and so is an empty string in the file, but for the keys that the
Rust mesh's file has too.

"""

_TABLES = """
## Rules and routes

These are in the file only. [policy.md](policy.md) says what they mean. Their order counts. Where a
list is accepted, one string is too; an empty list is an error, and so is a key that is not in these
tables.

"""

_FOOT = """
## The Rust mesh's file

The Rust mesh's own TOML file is accepted as it is: `[client]` (`enabled`, `address`, `port`) is
`outbound.listen`, `[auth]` with the same keys is `inbound.mode = "nginx"` with
`inbound.auth_listen` (nothing where `enabled` is false), and `[dstack]` and `[tls]` have the keys
above, where an empty string counts as not set.

## Shell completion

    eval "$(_DSTACK_MESH_COMPLETE=bash_source dstack-mesh)"     # bash, in ~/.bashrc
    eval "$(_DSTACK_MESH_COMPLETE=zsh_source dstack-mesh)"      # zsh, in ~/.zshrc
    _DSTACK_MESH_COMPLETE=fish_source dstack-mesh | source      # fish
"""


def document() -> str:
    """Write the whole page."""
    restricting = " and ".join(f"`{setting.env[0]}`" for setting in SCHEMA if setting.restricts)
    return (
        _HEAD.format(restricting=restricting)
        + as_markdown()
        + _TABLES
        + rules.as_markdown()
        + _FOOT
    )


if __name__ == "__main__":
    sys.stdout.write(document())
