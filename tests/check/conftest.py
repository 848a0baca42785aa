"""A world of apps, and the settings of one of them as `check` gets them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.check.result import Group, Result
from dstack_mesh.settings.load import Loaded, load_settings
from tests.integration.harness import Mesh, mesh


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Two apps, `a` and `b`, of which no sidecar runs yet."""
    async with mesh(tmp_path) as started:
        yield started


def loaded(one: Mesh, name: str, **environ: str) -> Loaded:
    """Give the settings of app `name`; the value `unset` takes a variable away."""
    env = {**one.app(name).env, **environ}
    return load_settings({}, {key: value for key, value in env.items() if value != "unset"}, None)


def statuses(group: Group) -> list[str]:
    return [one.status for one in group.results]


def named(group: Group, name: str) -> Result:
    (found,) = (one for one in group.results if one.name == name)
    return found
