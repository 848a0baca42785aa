"""The flags that every command with settings has, made from the settings' one table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dstack_mesh.settings.load import Loaded, load_settings
from dstack_mesh.settings.schema import BY_KEY, SCHEMA, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_F = TypeVar("_F", bound="Callable[..., Any]")


def settings_options(function: _F) -> _F:
    """Give a click command `-c`/`--config` and a flag for each setting, for `load`."""
    for setting in reversed(SCHEMA):
        function = _option(setting)(function)
    return click.option(
        "-c",
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The settings file (TOML).",
    )(function)


def load(config: Path | None, flags: Mapping[str, Any]) -> Loaded:
    """Load the settings from the options that `settings_options` made, environment and file.

    Raises SettingsError.
    """
    given = {_key(name): value for name, value in flags.items() if value is not None}
    return load_settings(given, os.environ, config)


def _option(setting: Setting) -> Callable[[_F], _F]:
    default = setting.default if setting.default is not None else setting.when_unset
    return click.option(
        setting.flag,
        _parameter(setting.key),
        metavar="|".join(setting.kind.words) or "VALUE",
        shell_complete=lambda _context, _parameter, start: [
            word for word in setting.kind.words if word.startswith(start)
        ],
        help=f"{setting.help} [{setting.env[0]}; default: {default}]",
    )


def _parameter(key: str) -> str:
    return key.replace(".", "__")


def _key(parameter: str) -> str:
    key = parameter.replace("__", ".")
    assert key in BY_KEY, f"{parameter} is no option of settings_options"  # noqa: S101  # ours alone
    return key
