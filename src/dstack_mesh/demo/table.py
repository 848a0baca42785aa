"""The demo for people: a table that grows line by line, whatever the terminal's size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Self

from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from dstack_mesh.demo.act import short
from dstack_mesh.demo.play import PARTS, suggestions
from dstack_mesh.demo.stage import OTHER

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from dstack_mesh.demo.act import Act, Result
    from dstack_mesh.demo.stage import Stage

_WIDEST = 140
_THREE_COLUMNS, _TWO_COLUMNS = 100, 64
"""Widths from which expectation and outcome stand side by side, and from which act and outcome."""

_HEADINGS = ("What was tried", "What should happen", "What happened")
_STATUS = re.compile(r"[1-5][0-9]{2}\b( [a-z_]+\b)?")


class TableDisplay:
    """Shows each act on `console` when it has ended. See `play.Display`.

    On a terminal a last line tells what is tried now. Use as a context manager, which leaves the
    terminal as it was.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, _WIDEST)
        self._results: list[Result] = []
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._tell("starting a KMS, two guest agents, a gateway and two sidecars")
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, stage: Stage) -> None:
        """Say who plays, and begin the table."""
        self._console.print(_cast(stage))
        self._console.print(self._row("", *(Text(text, "bold") for text in _HEADINGS)))
        self._console.print(Rule(style="dim"), width=self._width)

    def playing(self, act: Act) -> None:
        """Show what is tried now, below its part's heading."""
        part = next((name for name, acts in PARTS.items() if act is acts[0]), None)
        if part is not None:
            self._console.print(Text(f"    {part}\n", "bold cyan"))
        self._tell(act.tried)

    def played(self, result: Result) -> None:
        """Show the outcome."""
        act, outcome = result.act, result.outcome
        mark = Text("  ✓ ", "bold green") if outcome.ok else Text("  ✗ ", "bold red")
        happened = Text(outcome.happened, "" if outcome.ok else "red")
        happened.highlight_regex(_STATUS, "bold")
        self._results.append(result)
        self._console.print(self._row(mark, Text(act.tried), Text(act.expected, "dim"), happened))
        self._console.print()

    def end(self, seconds: float) -> None:
        """Say what it comes to."""
        self._live.stop()
        good = sum(result.outcome.ok for result in self._results)
        count = len(self._results)
        self._console.print(Rule(style="dim"), width=self._width)
        verdict = Text("    ")
        if good == count:
            verdict.append(f"All {count} went as they should", "bold green")
        else:
            verdict.append(f"{count - good} of {count} did not go as they should", "bold red")
        verdict.append(f", in {seconds:.1f} s.")
        self._console.print(verdict)

    def keep(self, stage: Stage) -> None:
        """Say what may be tried; lines to copy are never broken."""
        console = self._console
        console.print(Text("\nIt stays up until Ctrl-C. To try, in another terminal:\n", "bold"))
        for what, line in suggestions(stage):
            console.print(Text(f"# {what}", "dim"), soft_wrap=True)
            console.print(Text(line), soft_wrap=True)

    def _tell(self, what: str) -> None:
        self._live.update(Spinner("dots", Text(f" {what}", "dim", no_wrap=True)))

    def _row(self, mark: Text | str, tried: Text, expected: Text, happened: Text) -> Table:
        """Lay one row out as all others, in as many columns as there is room for."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=4)
        room = self._width - 6
        if self._width >= _THREE_COLUMNS:
            side = (room - 4) * 3 // 10
            for width in (side, side, room - 4 - 2 * side):
                table.add_column(width=width)
            table.add_row(mark, tried, expected, happened)
        elif self._width >= _TWO_COLUMNS:
            side = (room - 2) // 2
            table.add_column(width=side)
            table.add_column(width=side)
            table.add_row(mark, Text("\n").join((tried, expected)), happened)
        else:
            table.add_column(width=max(room, 10))
            table.add_row(mark, Text("\n").join((tried, expected, happened)))
        return table


def _cast(stage: Stage) -> RenderableType:
    """Say which apps there are, and how a request goes from one to the other."""
    caller, target = stage.caller, stage.target
    text = Text("\n")
    text.append("dstack-mesh demo", "bold")
    text.append(": two apps on this machine, under one simulated KMS\n\n")
    text.append(f"{caller.name} → its sidecar ⇒ gateway ⇒ {target.name}'s sidecar → {target.name}")
    text.append("\n→ plain HTTP   ⇒ mutual TLS, which the gateway does not open\n\n", "dim")
    apps = ((caller, stage.caller_app.app_id), (target, stage.target_app.app_id))
    for sidecar, app_id in apps:
        text.append(f"{sidecar.name:8}", "bold")
        text.append(f" app {short(app_id)}, sidecar {sidecar.outbound}, process {sidecar.pid}\n")
    text.append(f"{OTHER:8}", "bold")
    text.append(f" app {short(stage.other_app_id)}, which does not run here\n")
    return Padding(text, (0, 0, 0, 4))
