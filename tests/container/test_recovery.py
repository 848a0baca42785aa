"""What fails while a part is gone, by the contract's codes, and that it comes back by itself."""

from __future__ import annotations

import pytest

from tests.container.docker import BUILD_SECONDS, Answer, Stack, docker, eventually

pytestmark = [pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]


def failing(stack: Stack, codes: set[str], path: str = "/api/data") -> Answer:
    """Wait until calls fail in one of these ways, and in no other before."""
    answer = eventually(lambda: stack.call(path), lambda got: got.status != 200)
    assert answer.error in codes, answer
    return answer


def test_the_backend_is_killed(stack: Stack) -> None:
    docker("kill", stack.container("backend-app"))
    # nginx has one status for a backend that takes no connection and one that does not answer.
    codes = {"connect_failed; remote", "connect_timeout; remote"}
    failing(stack, codes | ({"response_timeout; remote"} if stack.mode == "nginx" else set()))
    docker("start", stack.container("backend-app"))
    assert stack.works_again() < 15


def test_the_backend_comes_back_elsewhere(stack: Stack) -> None:
    """docker gives a container that was started again any address."""
    backend, network = stack.container("backend-app"), f"{stack.project}_billing"
    docker("kill", backend)
    docker("network", "disconnect", network, backend)
    docker(
        "network", "connect", "--ip", "10.213.77.200", "--alias", "backend-app", network, backend
    )
    docker("start", backend)
    assert stack.address("backend-app", "billing") == "10.213.77.200"
    assert stack.works_again() < 15


def test_the_target_s_mesh_is_killed(stack: Stack) -> None:
    docker("kill", stack.container("billing-mesh"))
    assert failing(stack, {"tls_failed", "upstream_closed"}).status == 502
    assert stack.call().error == "tls_failed"
    docker("start", stack.container("billing-mesh"))
    assert stack.works_again() < 20


def test_the_caller_s_own_mesh_is_killed(stack: Stack) -> None:
    docker("kill", stack.container("shop-mesh"))
    assert stack.call().status == 0
    docker("start", stack.container("shop-mesh"))
    assert stack.works_again() < 20


def test_gateway_and_agents_are_killed(stack: Stack) -> None:
    """Connections through the gateway are cut with it; the meshes need nothing but patience."""
    docker("kill", stack.container("sim"))
    failing(stack, {"connect_failed", "connect_timeout", "upstream_closed"})
    agent = stack.curl("http://dstack-mesh/info")
    assert (agent.status, agent.error) == (502, "agent_unavailable")
    docker("start", stack.container("sim"))
    assert stack.works_again() < 20
    eventually(lambda: stack.curl("http://dstack-mesh/info").status, lambda status: status == 200)


@pytest.mark.parametrize("service", ["shop-mesh", "billing-mesh", "sim", "backend-app"])
def test_each_is_started_again_in_turn(stack: Stack, service: str) -> None:
    stack.compose("restart", "-t", "10", service)
    assert stack.works_again() < 20


@pytest.mark.parametrize("service", ["billing-mesh", "sim", "shop-mesh"])
def test_a_network_is_cut_and_comes_back(stack: Stack, service: str) -> None:
    network = f"{stack.project}_outside"
    docker("network", "disconnect", network, stack.container(service))
    try:
        # What was pooled has no route any more, or nobody answers; TCP may need its time to tell.
        answer = stack.call(options="-m 5")
        assert answer.status in (0, 502, 504), answer
        codes = {"tls_failed", "connect_failed", "connect_timeout", "upstream_closed"}
        assert answer.status == 0 or answer.error in codes, answer
    finally:
        docker("network", "connect", "--alias", service, network, stack.container(service))
    assert stack.works_again(40) < 40


def processes(stack: Stack, service: str) -> dict[str, int]:
    """Give the process ids in a container by their command lines."""
    text = stack.bash(
        service,
        "for p in /proc/[0-9]*; do echo \"${p#/proc/} $(tr '\\0' ' ' <$p/cmdline)\"; done",
        check=False,
    )
    found = (line.partition(" ") for line in text.splitlines())
    return {command.strip(): int(number) for number, _, command in found if command}


def test_a_process_that_dies_takes_the_container_along(stack: Stack) -> None:
    """And docker starts all of it again: nothing runs on half."""
    wanted = ["dstack_mesh run"] + (["nginx: master"] if stack.mode == "nginx" else [])
    for part in wanted:
        service = "billing-mesh"
        before = stack.inspect(service)["RestartCount"]
        number = next(pid for line, pid in processes(stack, service).items() if part in line)
        stack.bash(service, f"kill -9 {number}")
        eventually(
            lambda was=before: stack.inspect("billing-mesh")["RestartCount"] != was,  # type: ignore[misc]
            lambda done: done,
        )
        assert stack.works_again() < 30
        assert "container_process_ended" in stack.log(service)
