"""What the numbers were measured on, and with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from bench import tools
from bench.cores import LAYOUT

Machine = dict[str, str]
"""Texts by what a table calls them."""


def describe() -> Machine:
    """Describe this machine and the programs of other people that take part."""
    pinned = (
        f"the subject on core {LAYOUT.subject}, load and origin on {LAYOUT.load}"
        if LAYOUT.subject
        else "nothing is pinned: one core only, or no `taskset`"
    )
    return {
        "CPU": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": f"{len(os.sched_getaffinity(0))} ({pinned})",
        "memory": f"{_memory_gb(Path('/proc/meminfo').read_text()):.0f} GB",
        "system": f"{_distribution()}, Linux {platform.release()}",
        **{name: tools.version(name) for name in tools.PACKAGES},
    }


def cpu_model(cpuinfo: str) -> str:
    """Read the processor's name from /proc/cpuinfo; some architectures give none."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _memory_gb(meminfo: str) -> float:
    return int(meminfo.split()[1]) / 1e6


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "an unknown distribution"
