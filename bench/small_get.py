"""A small GET, 32 connections: CPU per request of the outbound side, beside nginx's."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import nginx
from bench.sidecar import Process, sidecar
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.world import app_id_of

_CALLER, _TARGET = app_id_of("a"), app_id_of("b")


def run(*, short: bool) -> dict[str, Any]:
    if nginx.find() is None or shutil.which("wrk") is None:
        return {"skipped": "needs nginx and wrk: apt-get install nginx-light wrk"}
    rounds, seconds = (1, 1) if short else (5, 4)
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        directory = Path(name)
        origin_port, proxy_port = nginx.free_port(), nginx.free_port()
        env = _credentials(directory)
        files = [directory / file for file in ("a.pem", "a.key", "root.pem")]
        target = [directory / file for file in ("b.pem", "b.key", "root.pem")]
        with (
            nginx.running(directory / "origin", nginx.origin(origin_port, *target)),
            nginx.running(
                directory / "proxy", nginx.client_proxy(proxy_port, origin_port, *files)
            ) as other,
            sidecar({**env, "MESH_GATEWAY": f"fixed/127.0.0.1:{origin_port}"}) as ours,
        ):
            found = _race(ours, other, proxy_port, rounds, seconds)
    return _report(found)


def _credentials(directory: Path) -> dict[str, str]:
    kms = Kms.create()
    for name, app_id in (("a", _CALLER), ("b", _TARGET)):
        issued = kms.issue(app_id)
        leaf, app_ca = issued.chain_pem[:2]
        (directory / f"{name}.pem").write_bytes(_bytes(leaf) + _bytes(app_ca))
        (directory / f"{name}.key").write_bytes(_bytes(issued.key_pem))
    (directory / "root.pem").write_bytes(_bytes(kms.root_pem))
    return {
        "MESH_CERT_FILE": str(directory / "a.pem"),
        "MESH_KEY_FILE": str(directory / "a.key"),
        "MESH_CA_FILE": str(directory / "root.pem"),
        "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
        "MESH_ADMIN_LISTEN": "127.0.0.1:0",
    }


def _bytes(pem: bytes | str) -> bytes:
    return pem if isinstance(pem, bytes) else pem.encode()


def _race(
    ours: Process, other: Process, proxy_port: int, rounds: int, seconds: int
) -> dict[str, list[tuple[float, float]]]:
    mesh = (ours, ours.bound["outbound"], [f"x-dstack-target-app: {_TARGET}"])
    peer = (other, f"127.0.0.1:{proxy_port}", [])
    found: dict[str, list[tuple[float, float]]] = {"mesh": [], "nginx": []}
    for subject in (mesh, peer):
        _load(*subject, 1)  # warm-up
    for _ in range(rounds):
        for name, subject in (("mesh", mesh), ("nginx", peer)):
            found[name].append(_load(*subject, seconds))
    return found


def _load(
    process: Process, address: str, headers: Sequence[str], seconds: int
) -> tuple[float, float]:
    """Give CPU µs per request, and requests per second."""
    before = process.cpu_seconds()
    command = ["wrk", "-t1", "-c32", f"-d{seconds}", f"http://{address}/"]
    for header in headers:
        command += ["-H", header]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spent = process.cpu_seconds() - before
    match = re.search(r"(\d+) requests in", out)
    assert match is not None, out
    assert "Non-2xx" not in out, out
    assert "Socket errors" not in out, out
    count = int(match[1])
    return spent / count * 1e6, count / seconds


def _report(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    cpu = {name: [one[0] for one in rounds] for name, rounds in found.items()}
    rate = {name: [one[1] for one in rounds] for name, rounds in found.items()}
    ratios = [a / b for a, b in zip(cpu["mesh"], cpu["nginx"], strict=True)]
    return {
        "outbound: CPU µs per request, mesh (median)": round(statistics.median(cpu["mesh"]), 1),
        "outbound: CPU µs per request, nginx (median)": round(statistics.median(cpu["nginx"]), 1),
        "outbound: ratio mesh/nginx (median of pairs)": round(statistics.median(ratios), 2),
        "outbound: requests per second, mesh (median)": round(statistics.median(rate["mesh"])),
        "outbound: requests per second, nginx (median)": round(statistics.median(rate["nginx"])),
    }
