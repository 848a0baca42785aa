"""`dstack-mesh version`: what runs here, for a bug report."""

from __future__ import annotations

import json
import platform
import ssl

import click

from dstack_mesh import __version__


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:
    """Print the versions of the mesh, Python and OpenSSL."""
    python = platform.python_version()
    if as_json:
        versions = {"version": __version__, "python": python, "openssl": ssl.OPENSSL_VERSION}
        click.echo(json.dumps(versions))
    else:
        click.echo(f"dstack-mesh {__version__} (Python {python}, {ssl.OPENSSL_VERSION})")
