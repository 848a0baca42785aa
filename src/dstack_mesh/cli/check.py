"""`dstack-mesh check`: what works and what does not, one line each."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstack_mesh.cli.options import load, settings_options
from dstack_mesh.errors import BadTarget
from dstack_mesh.outbound.target import parse_target
from dstack_mesh.settings import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dstack_mesh.check.result import Group, Result
    from dstack_mesh.model import Target
    from dstack_mesh.settings.load import Loaded

_PAUSE = 1.0
"""Seconds between two rounds while waiting."""

_WORDS = {"ok": "ok  ", "warning": "WARN", "failed": "FAIL", "skipped": "-   "}
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": None}


class _WrongUsage(click.ClickException):
    """One line on standard error, exit status 2."""

    exit_code = 2


@click.command
@click.argument("target_app", required=False)
@click.option(
    "--wait",
    metavar="S",
    default="0",
    help="Check again until nothing fails, for so long: 30s, 5m or plain seconds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options
def check(
    target_app: str | None, wait: str, as_json: bool, config: Path | None, **flags: Any
) -> int:
    """Tell what works and what does not, and what to do about it.

    Takes the settings that `run` takes, and may be asked while it runs or before. With TARGET_APP
    (an app-id) it also walks the whole way to that app, on the port of --default-port, and says at
    which step it ends. Exit status 1: something failed; warnings are none.
    """
    loaded = load(config, flags)
    target = _target(target_app, loaded)
    groups = _until_well(loaded, target, _seconds(wait))
    from dstack_mesh.check.result import all_well

    well = all_well(groups)
    if as_json:
        report = {"ok": well, "groups": [_as_json(group) for group in groups]}
        click.echo(json.dumps(report, indent=2))
    else:
        _print(groups)
    return 0 if well else 1


def _until_well(loaded: Loaded, target: Target | None, seconds: float) -> list[Group]:
    """Check, and again until nothing fails or `seconds` are over; give the last round."""
    import asyncio

    import uvloop

    from dstack_mesh.check.result import all_well
    from dstack_mesh.check.whole import check as check_all

    end = time.monotonic() + seconds
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        while True:
            groups = runner.run(check_all(loaded, target))
            left = end - time.monotonic()
            if all_well(groups) or left <= 0:
                return groups
            time.sleep(min(_PAUSE, left))


def _target(app: str | None, loaded: Loaded) -> Target | None:
    if app is None:
        return None
    port = loaded.settings.outbound.default_port
    try:
        return parse_target([app.encode()], [], [], port)
    except BadTarget:
        raise _WrongUsage(
            f"TARGET_APP is {json.dumps(app)}: accepted is an app-id, 40 hex digits"
        ) from None


def _seconds(text: str) -> float:
    try:
        return parse.duration_or_none(text)
    except ValueError:
        raise _WrongUsage(
            f"--wait is {json.dumps(text)}: accepted is a time such as 30s, 5m or plain seconds"
        ) from None


def _as_json(group: Group) -> dict[str, object]:
    return {"name": group.name, "checks": [asdict(one) for one in group.results]}


def _print(groups: Sequence[Group]) -> None:
    for group in groups:
        click.secho(group.name, bold=True)
        for one in group.results:
            _print_result(one)
        click.echo()
    results = [one.status for group in groups for one in group.results]
    failures, warnings = results.count("failed"), results.count("warning")
    said = f"{failures} failed, {warnings} to look at" if failures or warnings else "all is well"
    click.echo(said)


def _print_result(one: Result) -> None:
    word = click.style(_WORDS[one.status], fg=_COLOURS[one.status])
    click.echo(f"  {word}  {one.name}: {one.detail}")
    if one.remedy:
        click.echo(f"        -> {one.remedy}")
