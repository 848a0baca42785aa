"""The whole chain: client's sidecar, target's sidecar, backend; both sidecars counted together."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterator

from bench.contestants import NGINX, Contestant, inbound, nginx_inbound, nginx_outbound, outbound
from bench.origin import Origin, origin
from bench.plan import Found, Plan
from bench.process import Process, eventually
from bench.race import MESH, Readings, Row, Subject, race
from bench.sidecar import sidecar
from bench.simulator import simulator
from bench.turns import by_wrk

_CONNECTIONS = 32


def run(plan: Plan) -> Found:
    """Direct, against nginx to nginx; then through the simulator's gateway."""
    rows: list[Row] = []
    with origin() as made:
        with _direct(made) as mesh, _nginx_to_nginx(made) as peer:
            rows += _race("client, server, backend", [mesh, peer], made, plan)
        with _through_gateway(made) as mesh:
            rows += _race("client, the simulator's gateway, server, backend", [mesh], made, plan)
    return Found("The whole chain: small GET, 32 connections", rows)


def _race(scenario: str, chains: list[Contestant], made: Origin, plan: Plan) -> list[Row]:
    def subject(chain: Contestant) -> Subject:
        asked = by_wrk(chain, made, "/", _CONNECTIONS, plan.seconds(2.0))

        def turn() -> Readings:
            readings = asked.turn()
            return readings | {"rate_per_cpu": 1e6 / readings["cpu_us"]}

        return Subject(chain.name, turn)

    return race(scenario, [subject(chain) for chain in chains], plan.rounds)


@contextlib.contextmanager
def _direct(made: Origin) -> Iterator[Contestant]:
    with inbound(made) as server:
        port = int(server.address.rpartition(":")[2])
        with outbound(made, port) as client:
            both = client.process.together(server.process)
            yield Contestant(MESH, both, client.address, client.headers)


@contextlib.contextmanager
def _nginx_to_nginx(made: Origin) -> Iterator[Contestant]:
    with nginx_inbound(made) as server:
        port = int(server.address.rpartition(":")[2])
        with nginx_outbound(made, port) as client:
            yield Contestant(NGINX, client.process.together(server.process), client.address)


def _is_ready(process: Process) -> bool:
    connection = http.client.HTTPConnection(process.bound["admin"], timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200


@contextlib.contextmanager
def _through_gateway(made: Origin) -> Iterator[Contestant]:
    """Identities from the simulated agents, targets by the gateway's names, as in a CVM."""
    with simulator("a,b") as world:
        apps = world["apps"]
        ports = {"MESH_OUTBOUND_LISTEN": "127.0.0.1:0", "MESH_ADMIN_LISTEN": "127.0.0.1:0"}
        backend = {"MESH_BACKEND": f"127.0.0.1:{made.plain}"}
        with (
            sidecar(apps["b"]["env"] | ports | backend, "subject") as server,
            sidecar(apps["a"]["env"] | ports, "subject") as client,
        ):
            # Listening comes before the gateway's domain is known.
            eventually(lambda: _is_ready(client), 20, "the client's sidecar did not get ready")
            header = f"x-dstack-target-app: {apps['b']['app_id']}"
            both = client.together(server)
            yield Contestant(MESH, both, client.bound["outbound"], (header,))
