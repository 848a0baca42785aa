"""`dstack-mesh run`: one sidecar for one CVM, until it is told to end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from dstack_mesh.cli.options import load, settings_options
from dstack_mesh.log import event
from dstack_mesh.ops import logs

_log = logging.getLogger(__name__)


@click.command
@settings_options
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Write the bound addresses there (JSON) once listeners are open and an identity is there.",
)
def run(config: Path | None, ready_file: Path | None, **flags: Any) -> int:
    """Run the sidecar of this CVM.

    The command line beats the environment, which beats the file; `dstack-mesh config` takes the
    same flags and shows what they come to.
    """
    loaded = load(config, flags)
    logs.setup(loaded.settings.log.format, loaded.settings.log.level)
    for warning in loaded.warnings:
        event(_log, logging.WARNING, "settings_warning", detail=warning)

    from dstack_mesh import app  # wrong settings are told without its imports

    return app.run(loaded, ready_file)
