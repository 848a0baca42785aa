"""`dstack-mesh config`: the settings in effect, and where each came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dstack_mesh.cli.options import load, settings_options
from dstack_mesh.settings import render


@click.command
@settings_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON: value and source of each key.")
def config(config: Path | None, as_json: bool, **flags: Any) -> None:  # an option
    """Print the effective settings and where each came from.

    The output is a settings file that gives the same settings again. Warnings go to stderr.
    """
    loaded = load(config, flags)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(render.as_json(loaded), indent=2))
    else:
        click.echo(render.as_toml(loaded), nl=False)
