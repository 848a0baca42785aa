"""The supervisor as a process, with scripts for what it runs: signals, ends, order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest
from tests.integration.harness import eventually

PROGRAM = """
import asyncio, os, sys
from dstack_mesh.image.supervisor import Command, Supervisor
from dstack_mesh.ops import logs

logs.setup("json", "info")
scripts = sys.argv[2:]
commands = [Command(f"p{n}", ["bash", "-c", one], os.environ) for n, one in enumerate(scripts)]
sys.exit(asyncio.run(Supervisor(commands, None, float(sys.argv[1])).run()))
"""


async def supervise(directory: Path, *scripts: str, drain: float = 10.0) -> Process:
    """Run the scripts; each says that it is there by a file `ready-N`."""
    begun = [
        f"{one.replace('READY', f'touch {directory}/ready-{n}')}" for n, one in enumerate(scripts)
    ]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(drain), *begun), env=dict(os.environ), stderr=PIPE
    )
    await eventually(lambda: len(list(directory.glob("ready-*"))) == len(scripts), 20)
    return process


def polite(directory: Path, name: str) -> str:
    """Write a script that notes the signal that ends it, in a common file."""
    ends = "".join(
        f"trap 'echo {name} {number} >>{directory}/order; exit 0' {number}; "
        for number in ("TERM", "INT")
    )
    hang_up = f"trap 'echo {name} HUP >>{directory}/order' HUP; "
    return f"{ends}{hang_up}READY; while :; do sleep 0.05; done"


async def ended(process: Process) -> tuple[int, str]:
    async with asyncio.timeout(30):
        _, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, error.decode()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_the_mesh_ends_before_what_it_needs(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = await supervise(tmp_path, polite(tmp_path, "bridge"), polite(tmp_path, "mesh"))
    process.send_signal(number)
    assert (await ended(process))[0] == status
    name = number.name.removeprefix("SIG")
    assert (tmp_path / "order").read_text() == f"mesh {name}\nbridge {name}\n"


@pytest.mark.parametrize("dying", ["bridge", "mesh"])
async def test_one_that_ends_takes_the_others_along(tmp_path: Path, dying: str) -> None:
    dead = f"READY; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 7"
    scripts = [dead if dying == name else polite(tmp_path, name) for name in ("bridge", "mesh")]
    process = await supervise(tmp_path, *scripts)
    (tmp_path / "go").touch()
    status, log = await ended(process)
    assert status == 1
    assert '"event": "container_process_ended"' in log
    assert '"reason": "exit status 7"' in log
    other = "mesh" if dying == "bridge" else "bridge"
    assert (tmp_path / "order").read_text() == f"{other} TERM\n"


async def test_one_that_does_not_end_is_ended(tmp_path: Path) -> None:
    stubborn = "trap '' TERM; READY; while :; do sleep 0.05; done"
    process = await supervise(tmp_path, stubborn, drain=0.3)
    process.send_signal(signal.SIGTERM)
    assert (await ended(process))[0] == 0


async def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    patient = f"trap 'touch {tmp_path}/asked' TERM; READY; while :; do sleep 0.05; done"
    process = await supervise(tmp_path, patient, drain=60)
    process.send_signal(signal.SIGTERM)
    await eventually((tmp_path / "asked").exists)
    process.send_signal(signal.SIGTERM)
    assert (await ended(process))[0] == 143


async def test_sighup_is_for_the_mesh(tmp_path: Path) -> None:
    process = await supervise(tmp_path, polite(tmp_path, "bridge"), polite(tmp_path, "mesh"))
    process.send_signal(signal.SIGHUP)
    await eventually((tmp_path / "order").exists)
    assert (tmp_path / "order").read_text() == "mesh HUP\n"
    process.send_signal(signal.SIGTERM)
    assert (await ended(process))[0] == 0


async def test_one_that_cannot_be_started(tmp_path: Path) -> None:
    program = PROGRAM.replace('"bash"', '"/no/such/program"')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, "1", "x"), stderr=PIPE
    )
    status, log = await ended(process)
    assert status == 1
    assert "/no/such/program" in log
    assert "Traceback" not in log
