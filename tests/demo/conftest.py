from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from dstack_mesh.demo.stage import Stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncIterator[Stage]:
    """One running mesh for all tests that only send requests through it."""
    async with Stage() as one:
        yield one
