"""`docs/settings.md`, written from the table: `python -m dstack_mesh.settings.docs > FILE`."""

from __future__ import annotations

import sys

from dstack_mesh.settings.render import as_markdown

_HEAD = """\
<!-- Made by `python -m dstack_mesh.settings.docs`; a test holds it true. -->
# Settings

The command line beats the environment, which beats the TOML file (`-c FILE`), which beats the
default. `dstack-mesh config` prints the settings in effect as a TOML file, each with its source.

An empty or otherwise bad value, an unknown key in the file, or settings that do not go together
stop the start with exit status 2 and one line that names the key, the value and what is accepted.
An unknown `MESH_…` variable is a warning that names the nearest known one. Where a setting has two
variables, the first wins.

"""

_FOOT = """
The Rust mesh's own TOML file is accepted as it is: `[client]` (`enabled`, `address`, `port`) is
`outbound.listen`, `[dstack]` and `[tls]` have the keys above, and `[auth]` is understood, but has
no effect in this version.

## Shell completion

    eval "$(_DSTACK_MESH_COMPLETE=bash_source dstack-mesh)"     # bash, in ~/.bashrc
    eval "$(_DSTACK_MESH_COMPLETE=zsh_source dstack-mesh)"      # zsh, in ~/.zshrc
    _DSTACK_MESH_COMPLETE=fish_source dstack-mesh | source      # fish
"""


def document() -> str:
    """Write the whole page."""
    return _HEAD + as_markdown() + _FOOT


if __name__ == "__main__":
    sys.stdout.write(document())
