"""The example as it is, in both inbound modes: the users' own lines from the client's container."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time

import pytest
from websockets.sync.client import connect

from dstack_mesh.sim.world import app_id_of, instance_id_of
from tests.container.docker import BUILD_SECONDS, Stack, eventually

pytestmark = [pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]

SHOP, BILLING = app_id_of("shop"), app_id_of("billing")


def test_it_comes_up_and_serves_a_first_request(stack: Stack) -> None:
    """`up` has ended well: whoever waits for another is healthy. The client prints its call."""
    log = eventually(lambda: stack.log("client"), lambda log: "body_sha256" in log)
    assert f"I am {SHOP}" in log
    shown = json.loads(log.partition("\n")[2])
    assert (shown["method"], shown["target"]) == ("GET", "/api/data")
    assert ["x-dstack-app-id", SHOP] in shown["headers"]


def test_every_container_is_healthy(stack: Stack) -> None:
    for service in ("sim", "shop-mesh", "billing-mesh", "backend-app", "client"):
        eventually(
            lambda name=service: stack.inspect(name)["State"]["Health"]["Status"],  # type: ignore[index,misc]
            lambda status: status == "healthy",
        )


def test_the_users_lines(stack: Stack) -> None:
    assert stack.bash("client", "curl -s http://dstack-mesh/info | jq -r .app_id") == f"{SHOP}\n"
    for options in (
        "",
        '-H "x-dstack-target-port: 443"',
        '-H "Host: vpc-server"',
        '-H "x-dstack-target-port: 443" -H "Host: vpc-server"',
    ):
        line = f'curl -s -H "x-dstack-target-app: $APP_ID" {options} http://dstack-mesh/api/data'
        seen = json.loads(stack.bash("client", line))
        fields = {name.lower(): value for name, value in seen["headers"]}
        assert fields["x-dstack-app-id"] == SHOP
        assert fields["host"] == ("vpc-server" if "Host" in options else "dstack-mesh")
        assert not [name for name in fields if name.startswith("x-dstack-target-")]


def test_an_app_reaches_itself_and_its_own_paths(stack: Stack) -> None:
    at = "backend-app"
    line = "curl -s http://dstack-mesh/info"
    assert json.loads(stack.bash(at, line))["app_id"] == BILLING
    own = stack.curl(f"-H 'x-dstack-target-app: {BILLING}' http://dstack-mesh/api/data", at=at)
    assert own.fields["x-dstack-app-id"] == [BILLING]
    assert stack.curl("http://dstack-mesh/health", at=at).status == 200
    gateway = json.loads(stack.curl("http://dstack-mesh/gateway", at=at).body)
    assert gateway == {"gateway_domain": "sim.dstack.test"}


def test_an_upload(stack: Stack) -> None:
    size = 50 * 1024 * 1024
    answer = stack.call("/upload", f"-T <(head -c {size} /dev/zero) -H 'Expect:'")
    told = json.loads(answer.body)
    assert (told["bytes"], told["sha256"]) == (size, hashlib.sha256(bytes(size)).hexdigest())


def test_a_stream_arrives_as_it_is_sent(stack: Stack) -> None:
    line = (
        'curl -sN -H "x-dstack-target-app: $APP_ID" "http://dstack-mesh/events?n=4&seconds=0.5"'
        " | while read -r line; do date +%s.%N; done"
    )
    times = [float(one) for one in stack.bash("client", line).split()]
    assert times[-1] - times[0] > 1.0


def test_a_websocket(stack: Stack) -> None:
    url = f"ws://{stack.address('shop-mesh', 'shop')}/ws"
    with connect(url, additional_headers={"x-dstack-target-app": BILLING}) as socket:
        for message in ("hello", "x" * 100_000, b"\x00\xff"):
            socket.send(message)
            assert socket.recv(timeout=10) == message


def test_an_app_that_nobody_knows(stack: Stack) -> None:
    answer = stack.curl(f"-H 'x-dstack-target-app: {'ab' * 20}' http://dstack-mesh/")
    assert (answer.status, answer.error) == (502, "tls_failed")


def test_another_app_than_asked_for_gets_nothing(stack: Stack) -> None:
    """The gateway leads to an instance of billing, and shop was asked for."""
    before = stack.log("backend-app")
    answer = stack.curl(
        f"-H 'x-dstack-target-app: {SHOP}' -H 'x-dstack-target-instance: "
        f"{instance_id_of('billing')}' -d secret http://dstack-mesh/"
    )
    assert (answer.status, answer.error) == (502, "peer_app_id_mismatch")
    assert stack.log("backend-app") == before


def test_what_a_caller_says_of_itself_is_not_believed(stack: Stack) -> None:
    forged = {
        "x-dstack-app-id": BILLING,
        "X_Dstack_App_Id": BILLING,
        "x-real-ip": "6.6.6.6",
        "x-forwarded-proto": "http",
        "x-client-cert": "forged",
        "x-client-verify": "SUCCESS",
    }
    options = " ".join(f"-H '{name}: {value}'" for name, value in forged.items())
    fields = stack.call(options=options).fields
    assert fields["x-dstack-app-id"] == [SHOP]
    assert fields["x-forwarded-proto"] == ["https"]
    assert fields["x-real-ip"] == [stack.address("sim", "outside")]  # the gateway, which splices
    for name in ("x_dstack_app_id", "x-client-cert", "x-client-verify"):
        assert name not in fields


def test_who_shows_no_certificate_sees_health_alone(stack: Stack) -> None:
    health = stack.curl("-k https://billing-mesh/health", at="sim")
    assert (health.status, health.body.strip()) == (200, "OK")
    answer = stack.curl("-k -H 'x-dstack-app-id: x' https://billing-mesh/api/data", at="sim")
    assert (answer.status, answer.error) == (401, "client_cert_required")


def test_without_a_backend_nothing_listens_for_callers(stack: Stack) -> None:
    assert stack.curl("-k https://shop-mesh/health", at="sim").status == 0


def test_nobody_else_reaches_admin_or_auth(stack: Stack) -> None:
    for port in (8091, 8092, 8093):
        answer = stack.curl(f"http://billing-mesh:{port}/metrics", at="backend-app")
        assert answer.status == 0, port
    assert stack.bash("billing-mesh", "curl -s http://127.0.0.1:8093/livez") != ""


def test_a_request_in_flight_is_finished_at_the_end(stack: Stack) -> None:
    line = (
        'curl -s -o /dev/null -w "%{http_code}" -H "x-dstack-target-app: $APP_ID"'
        ' "http://dstack-mesh/slow?seconds=4" >/tmp/slow & sleep 1; touch /tmp/asked; wait'
    )
    container = stack.container("client")
    asking = subprocess.Popen(["docker", "exec", container, "bash", "-c", line])
    try:
        eventually(
            lambda: stack.bash("client", "ls /tmp/asked", check=False), lambda text: text != ""
        )
        began = time.monotonic()
        stack.compose("stop", "-t", "35", "billing-mesh")
        assert time.monotonic() - began < 15
        asking.wait(timeout=20)
        assert stack.bash("client", "cat /tmp/slow") == "200"
        state = stack.inspect("billing-mesh")["State"]
        assert isinstance(state, dict)
        assert state["ExitCode"] == 0, stack.log("billing-mesh")
    finally:
        asking.kill()
        asking.wait()
        stack.compose("start", "billing-mesh")
        stack.bash("client", "rm -f /tmp/asked /tmp/slow")
    stack.works_again()
