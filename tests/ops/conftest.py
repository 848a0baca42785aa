from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.integration.harness import Mesh, mesh


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A world of three apps, none of which has been started."""
    async with mesh(tmp_path, ("a", "b", "c")) as found:
        yield found
