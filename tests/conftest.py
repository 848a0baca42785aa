"""The event loop of every test is the one the sidecar runs on; and what any test may ask for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop

from dstack_mesh.ops.logs import LineHandler


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Undo what a test sets up for the whole process's log."""
    ours, root = logging.getLogger("dstack_mesh"), logging.getLogger()
    levels = ours.level, root.level
    yield
    for handler in root.handlers[:]:
        if isinstance(handler, LineHandler):
            root.removeHandler(handler)
    ours.setLevel(levels[0])
    root.setLevel(levels[1])
    logging.captureWarnings(capture=False)
