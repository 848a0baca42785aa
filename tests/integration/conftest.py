from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.harness import Mesh, mesh


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Two apps, `a` and `b`, each with a sidecar and a backend."""
    async with mesh(tmp_path) as one:
        await one.start("a")
        await one.start("b")
        yield one
