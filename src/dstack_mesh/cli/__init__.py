"""The command `dstack-mesh`: which commands there are, and how each one ends.

A command is the click command of its name in the module of its name, imported when it is called:
`dstack-mesh run` must not pay for what draws the demo's tables.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from dstack_mesh import __version__
from dstack_mesh.settings.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "run": "Run the sidecar of this CVM.",
    "await": "Wait until the mesh is ready, then run a command.",
    "check": "Tell what works and what does not, and what to do.",
    "demo": "Show a whole mesh of two apps on this machine.",
    "sim": "Simulate KMS, guest agents and gateway for development.",
    "policy": "Explain what the policy decides about a request.",
    "inspect": "Tell who a certificate says it is, and whether its chain holds.",
    "nginx-config": "Print a configuration of nginx for nginx mode.",
    "config": "Print the effective settings and where each came from.",
    "version": "Print the versions of the mesh and what it runs on.",
}

_MODULES = {"await": "await_mesh"}
"""Where a command's name, with `_` for `-`, cannot be a function's."""

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

_CONFIG_FLAGS = ("-c", "--config")


class LazyCommands(click.Group):
    """A group that imports a command's module only to run, complete or explain that command."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # click's signature
        """List the commands, the most used first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command `cmd_name`, or None where there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        name = _MODULES.get(cmd_name, cmd_name.replace("-", "_"))
        module = importlib.import_module(f"{__name__}.{name}")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in the help without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the commands' names without importing them."""
        found = [
            CompletionItem(name, help=text)
            for name, text in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take `-c FILE` without a command for `run -c FILE`, as the Rust mesh is called."""
        if args and (args[0] in _CONFIG_FLAGS or args[0].startswith(("-c", "--config="))):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, and name the nearest where there is none of that name."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {name!r}.{hint} Commands: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Mutual authentication between dstack apps: a sidecar that verifies first.

    `dstack-mesh -c FILE` without a command is `dstack-mesh run -c FILE`.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (default: the process's) and give its exit status.

    0 done, 1 failed, 2 wrong usage or settings, 130 interrupted. A reader of our output that goes
    away early (`dstack-mesh config | head -1`) is no reason to complain.
    """
    try:
        result = cli.main(args=args, prog_name="dstack-mesh", standalone_mode=False)
        sys.stdout.flush()
    except SettingsError as error:
        return _refuse(f"dstack-mesh: {error}", WRONG_USAGE)
    except click.UsageError as error:
        error.show()
        return WRONG_USAGE
    except click.ClickException as error:
        return _refuse(f"dstack-mesh: {error.format_message()}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return FAILED
    return result if isinstance(result, int) else DONE


def _refuse(line: str, status: int) -> int:
    click.echo(line, err=True)
    return status


def _discard_stdout() -> None:
    """Let the interpreter's own flush at its end find a reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
