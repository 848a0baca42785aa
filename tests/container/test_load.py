"""32 connections of wrk through both meshes: no error, and the CPU that the called side takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dstack_mesh.sim.world import app_id_of
from tests.container.docker import BUILD_SECONDS, REPOSITORY, Stack, docker

pytestmark = [pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]

SECONDS = 5
_TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(autouse=True, scope="module")
def wrk() -> None:
    if shutil.which("wrk") is None:
        assert os.environ.get("CI") != "true", "there is no wrk; CI has to have it"
        pytest.skip("there is no wrk")


def cpu_seconds(stack: Stack, service: str) -> dict[str, float]:
    """Give the processor time of a container's processes so far, nginx's and the mesh's."""
    found = {"nginx": 0.0, "mesh": 0.0}
    for line in docker("top", stack.container(service), "-eo", "pid,args").splitlines()[1:]:
        number, command = line.split(None, 1)
        part = "nginx" if "nginx" in command else "mesh" if "dstack_mesh run" in command else None
        if part is not None:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            found[part] += (int(fields[11]) + int(fields[12])) / _TICKS
    return found


def test_thirty_two_connections(stack: Stack) -> None:
    url = f"http://{stack.address('shop-mesh', 'shop')}/"
    command = [
        *("wrk", "-t1", "-c32", f"-d{SECONDS}s", "--timeout", "10s"),
        *("-H", f"x-dstack-target-app: {app_id_of('billing')}", url),
    ]
    stack.works_again()
    before = cpu_seconds(stack, "billing-mesh")
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    after = cpu_seconds(stack, "billing-mesh")
    assert "Socket errors" not in ran.stdout, ran.stdout
    assert "Non-2xx" not in ran.stdout, ran.stdout
    requests = int(re.search(r"(\d+) requests in", ran.stdout)[1])  # type: ignore[index]
    assert requests > 100
    spent = {part: (after[part] - before[part]) / requests * 1e6 for part in before}
    told = ", ".join(f"{part} {value:.0f}" for part, value in spent.items())
    line = f"{stack.mode}: {requests} requests, CPU of the called side in us a request: {told}"
    report = REPOSITORY / "build" / "container-load.txt"
    report.parent.mkdir(exist_ok=True)
    with report.open("a") as file:
        file.write(f"{line}\n")
