"""`dstack-mesh inspect`: who a certificate says it is, and whether its chain holds."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dstack_mesh.cli import certificates
from dstack_mesh.cli.certificates import Described, UnreadableError, Value, Verdict
from dstack_mesh.dstack.agent import AgentClient
from dstack_mesh.gateway_domain import is_address
from dstack_mesh.model import Role, TcpAddress, UnixAddress
from dstack_mesh.settings import parse
from dstack_mesh.settings.load import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509

    from dstack_mesh.model import Address

_MAX_INPUT = 4 * 1024 * 1024
_AGENT_TIMEOUT = 5.0
_THROW_AWAY_SECONDS = 300
_LOCAL_PROVIDER = (
    "no app-id: the certificate of a CVM with a local key provider, or of the guest agent"
    " simulator, has none, and such a machine can't be a member of the mesh"
)


class _WrongUsage(click.ClickException):
    """One line on standard error, exit status 2."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class _Root:
    """What to judge by: the root and where it is from, or no root and why."""

    certificate: x509.Certificate | None
    origin: str


@click.command
@click.argument("source", metavar="FILE|-|HOST:PORT")
@click.option("--ca", metavar="FILE", help="Judge the chain by this KMS root (PEM or DER).")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    help="Judge it as a target (a TLS server) or as a caller (a TLS client).  [default: a server"
    " as a target, a file as either]",
)
@click.option("--servername", metavar="NAME", help="The server name to ask HOST:PORT for (SNI).")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="The settings file (TOML).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    source: str,
    ca: str | None,
    role: str | None,
    servername: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Tell who a certificate says it is, and whether its chain holds.

    FILE has one certificate or a chain, leaf first (PEM or DER); - is standard input. HOST:PORT is
    asked for its chain in a TLS handshake without a certificate of our own.

    The chain is judged by --ca, or else by the root of the configured identity (the settings'
    CA file, or the guest agent's). With neither it is not judged. Exit status 1: the chain does not
    hold, or could not be read.
    """
    root = _given_root(ca) if ca is not None else None
    address = _address(source)
    if address is None and servername is not None:
        raise _WrongUsage(f"--servername is for HOST:PORT, and {_shown(source)} is read as a file")
    try:
        links = _fetch(address, servername) if address else _read_source(source)
    except UnreadableError as error:
        raise click.ClickException(f"{_shown(source)}: {error}") from error
    root = root or _configured_root(config)
    now = time.time()
    described = [certificates.describe(link, now) for link in links]
    verdict = None
    if root.certificate is not None:
        roles = [Role(role)] if role else [Role.TARGET] if address else list(Role)
        verdict = certificates.judge(links, root.certificate, roles, now)
    if as_json:
        click.echo(json.dumps(_as_json(source, described, verdict, root), indent=2))
    else:
        _print(source, described, verdict, root)
    return 0 if verdict is None or verdict.holds else 1


def _address(source: str) -> TcpAddress | None:
    """A file of that name wins; what is neither is left to be reported as a missing file."""
    if source == "-" or os.path.lexists(source):
        return None
    try:
        return parse.tcp(source)
    except ValueError:
        return None


def _fetch(address: TcpAddress, servername: str | None) -> list[x509.Certificate]:
    name = servername or (None if is_address(address.host) else address.host)
    return certificates.fetch_certificates(address, name)


def _read_source(source: str) -> list[x509.Certificate]:
    if source == "-":
        return certificates.read_certificates(_bounded(sys.stdin.buffer.read(_MAX_INPUT + 1)))
    return certificates.read_certificates(_file(source, "; nor is it HOST:PORT"))


def _file(path: str, if_missing: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return _bounded(file.read(_MAX_INPUT + 1))
    except FileNotFoundError as error:
        raise UnreadableError(f"there is no such file{if_missing}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableError(f"it cannot be read: {reason}") from error


def _bounded(content: bytes) -> bytes:
    if len(content) > _MAX_INPUT:
        raise UnreadableError(f"it is larger than {_MAX_INPUT} bytes")
    return content


def _given_root(path: str) -> _Root:
    try:
        found = certificates.read_certificates(_file(path, ""))
    except UnreadableError as error:
        raise _WrongUsage(f"--ca {_shown(path)}: {error}") from error
    if len(found) != 1:
        raise _WrongUsage(
            f"--ca {_shown(path)}: it holds {len(found)} certificates; accepted is one, the root"
        )
    return _Root(found[0], f"--ca {_shown(path)}")


def _configured_root(config: Path | None) -> _Root:
    """Raises SettingsError, also where the CA file of the settings is none."""
    loaded = load_settings({}, os.environ, config)
    ca_file = loaded.settings.tls.ca_file
    if ca_file is not None:
        given = _given_root(ca_file)
        return _Root(given.certificate, f"{loaded.sources['tls.ca_file']}, {_shown(ca_file)}")
    agent = loaded.settings.dstack.agent
    by_default = loaded.sources["dstack.agent"].kind == "default"
    if by_default and isinstance(agent, UnixAddress) and not Path(agent.path).exists():
        return _Root(
            None, "no root to judge by: give --ca FILE, or run this where a mesh is set up"
        )
    try:
        return _Root(_agents_root(agent), f"the guest agent at {agent}")
    except UnreadableError as error:
        return _Root(None, f"the guest agent at {agent} gave no root: {error}; give --ca FILE")


def _agents_root(agent: Address) -> x509.Certificate:
    try:
        chain = _agents_chain(agent)
    except Exception as error:
        # A stranger's answer: whatever is wrong with it, there is no root.
        reason = _shown(str(error).partition("\n")[0])
        raise UnreadableError(f"{type(error).__name__}: {reason}") from error
    if len(chain) != 3:
        raise UnreadableError(
            f"its chain has {len(chain)} certificates, not leaf, app CA and root: a local key"
            " provider has no KMS"
        )
    return certificates.read_certificates(chain[-1].encode())[0]


def _agents_chain(agent: Address) -> list[str]:
    """The agent tells its root only along with a certificate, which is thrown away here."""
    client = AgentClient(agent, timeout=_AGENT_TIMEOUT)
    not_after = int(time.time()) + _THROW_AWAY_SECONDS
    key = asyncio.run(client.get_tls_key(subject="dstack-mesh inspect", not_after=not_after))
    return list(key[1])


# What is shown


def _headline(
    source: str, described: Sequence[Described], verdict: Verdict | None, root: _Root
) -> str:
    app_id = described[0].app_id
    says = (
        f"{_shown(source)} says it is app {app_id}" if app_id else f"{_shown(source)} names no app"
    )
    if verdict is None:
        return f"{says}. Not judged: {root.origin}"
    if verdict.holds:
        roles = " and as ".join(f"a {role.value}" for role in verdict.roles)
        return f"{says}. Its chain holds by {root.origin}, as {roles}"
    return f"{says}. Its chain does NOT hold by {root.origin}: {verdict.reason}"


def _note(described: Sequence[Described]) -> str | None:
    leaf = described[0].fields
    return _LOCAL_PROVIDER if leaf["app_id"] is None and leaf["ca"] == "no" else None


def _as_json(
    source: str, described: Sequence[Described], verdict: Verdict | None, root: _Root
) -> dict[str, object]:
    return {
        "source": source,
        "app_id": described[0].app_id,
        "judged_by": None if verdict is None else root.origin,
        "holds": None if verdict is None else verdict.holds,
        "roles": [] if verdict is None else [role.value for role in verdict.roles],
        "reason": root.origin if verdict is None else verdict.reason or None,
        "note": _note(described),
        "certificates": [described_one.fields for described_one in described],
    }


def _print(
    source: str, described: Sequence[Described], verdict: Verdict | None, root: _Root
) -> None:
    headline = _headline(source, described, verdict, root)
    note = _note(described)
    if sys.stdout.isatty():
        _print_tables(headline, note, described, verdict)
        return
    click.echo("\n".join([headline, *([note] if note else [])]))
    for number, one in enumerate(described, 1):
        click.echo(f"\ncertificate {number} of {len(described)}")
        for name, value in one.fields.items():
            label = _label(name)
            for line in _lines(value):
                click.echo(f"  {label:<20}{line}")
                label = ""


def _print_tables(
    headline: str, note: str | None, described: Sequence[Described], verdict: Verdict | None
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    holds = None if verdict is None else verdict.holds
    style = {None: "bold", True: "bold green", False: "bold red"}[holds]
    console.print(Text(headline, style=style))
    if note:
        console.print(Text(note, style="yellow"))
    for number, one in enumerate(described, 1):
        table = Table(title=f"certificate {number} of {len(described)}", show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in one.fields.items():
            # As Text: what a certificate says is no markup.
            table.add_row(_label(name), Text("\n".join(_lines(value))))
        console.print(table)


_LABELS = {"ca": "CA", "app_id": "app-id", "sha256": "SHA-256"}


def _lines(value: Value) -> list[str]:
    if value is None:
        return ["none"]
    if isinstance(value, dict):
        return [f"{_label(name)} {text}" for name, text in value.items()]
    return [value] if isinstance(value, str) else [", ".join(value)]


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)
