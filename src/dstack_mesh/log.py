"""Structured log events: a short snake_case name and fields, rendered by `ops.logs`."""

from __future__ import annotations

import logging


def event(logger: logging.Logger, level: int, name: str, /, **fields: object) -> None:
    """Log `name` with `fields`; never pass a key, a body, a credential or a cookie in them."""
    if logger.isEnabledFor(level):
        logger.log(level, name, extra={"fields": fields}, stacklevel=2)
