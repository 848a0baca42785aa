"""What `bench/hostile.py` takes of the outbound races."""

from __future__ import annotations

from pathlib import Path

from bench.credentials import TARGET, Authority

_TARGET = TARGET


def _credentials(directory: Path) -> dict[str, str]:
    """Issue `a`, the caller, and `b`, the target; give the settings of the caller's sidecar."""
    authority = Authority(directory)
    authority.issue("b")
    return authority.issue("a").env()
