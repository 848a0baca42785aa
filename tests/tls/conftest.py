"""No attack on TLS may leave a traceback or an error in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


class _Loud(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    loud = _Loud()
    logging.getLogger().addHandler(loud)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(loud)
    assert not loud.found
