"""`dstack-mesh nginx-config`: the configuration of nginx that goes with nginx mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dstack_mesh.cli.options import load, settings_options


@click.command
@settings_options
@click.option(
    "--server", is_flag=True, help="Print only what belongs inside `http { }`: the server block."
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where nginx keeps its pid file and directories for temporary files.",
)
def nginx_config(config: Path | None, server: bool, state_dir: Path | None, **flags: Any) -> None:
    """Print a configuration for nginx that matches the settings.

    nginx then terminates the callers' TLS on inbound.listen, asks the auth service of a sidecar in
    nginx mode, and passes on to inbound.backend. It reads its identity from the files of the
    settings tls.cert_file, tls.key_file and tls.ca_file. Warnings go to stderr.
    """
    loaded = load(config, flags)
    from dstack_mesh.inbound.nginx_config import (  # wrong settings are told without its imports
        DEFAULT_FILES,
        http_part,
        nginx_options,
        whole_file,
    )

    options = nginx_options(loaded.settings, state_dir)
    warnings = list(loaded.warnings)
    if loaded.settings.inbound.mode != "nginx":
        warnings.append(
            f"inbound.mode is {loaded.settings.inbound.mode}: nothing answers nginx unless the"
            " sidecar runs with MESH_INBOUND_MODE=nginx"
        )
    if loaded.settings.tls.cert_file is None:
        warnings.append(
            f"{', '.join(DEFAULT_FILES)} are not set: nginx will look for"
            f" {', '.join(DEFAULT_FILES.values())}"
        )
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(http_part(options) if server else whole_file(options), nl=False)
