"""The image's entry: `python -m dstack_mesh.image [COMMAND …]`.

Without a command, or with `run` or `-c FILE`, it runs the sidecar, and gives up root for it. Any
other command of dstack-mesh is run as it is, and so is any other program.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from dstack_mesh.cli import COMMANDS
from dstack_mesh.image.environment import with_older_names

if TYPE_CHECKING:
    from collections.abc import Sequence

MESH = (sys.executable, "-m", "dstack_mesh")


def main(args: Sequence[str]) -> int:
    """Become what `args` ask for; the exit status where that is not another program."""
    own = list(args[1:] if args[:1] == ["dstack-mesh"] else args)
    first = own[0] if own else "run"
    if first == "run" or first.startswith(("-c", "--config")):
        from dstack_mesh.image.sidecar import run_sidecar  # another command is not to wait for it

        return run_sidecar(own[1:] if own[:1] == ["run"] else own, MESH)
    if first in COMMANDS or first.startswith("-"):
        own = [*MESH, *own]
    try:
        os.execvpe(own[0], own, with_older_names(os.environ))  # noqa: S606 - it is our purpose
    except OSError as error:
        print(f"dstack-mesh: {own[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
