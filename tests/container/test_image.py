"""The image itself: what is in its layers, who runs what, and how it takes what it is given."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from tests.container.docker import BUILD_SECONDS, REPOSITORY, Stack, docker, eventually

pytestmark = [pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]

_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]")
_COMPILERS = re.compile(r"(^|/)(gcc|g\+\+|cc|c\+\+|clang|ld|as|make|cc1|rustc)(-[\d.]+)?$")


@pytest.fixture(scope="module")
def layers(image: str) -> Iterator[list[tarfile.TarFile]]:
    """Every layer above the base's, those that another has covered included."""
    count = {
        name: len(json.loads(docker("inspect", name))[0]["RootFS"]["Layers"])
        for name in (image, "debian:bookworm-slim")
    }
    saved = subprocess.run(["docker", "save", image], capture_output=True, timeout=120, check=True)
    with tarfile.open(fileobj=io.BytesIO(saved.stdout)) as whole:
        manifest = json.load(whole.extractfile("manifest.json"))  # type: ignore[arg-type]
        names = manifest[0]["Layers"][count["debian:bookworm-slim"] :]
        assert len(names) == count[image] - count["debian:bookworm-slim"] > 0
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(tarfile.open(fileobj=whole.extractfile(name))) for name in names
            ]


def test_no_layer_has_a_key(layers: list[tarfile.TarFile]) -> None:
    seen = 0
    for layer in layers:
        for member in layer:
            if member.isfile():
                content = layer.extractfile(member).read()  # type: ignore[union-attr]
                assert not _KEY.search(content), member.name
                seen += 1
    assert seen > 1000


def test_no_layer_has_pips_settings_or_a_compiler(layers: list[tarfile.TarFile]) -> None:
    for layer in layers:
        for member in layer.getmembers():
            assert not _COMPILERS.search(member.name), member.name
            assert "pip.conf" not in member.name
            assert "/site-packages/pip/" not in member.name


def test_nothing_is_setuid(image: str) -> None:
    """Nor set-group-id: not what is ours, and not what Debian's packages bring."""
    line = "find / -xdev -type f -perm /6000"
    assert docker("run", "--rm", "--entrypoint", "sh", image, "-c", line) == ""


def test_its_history_tells_no_secret(image: str) -> None:
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert "PIP_" not in history
    assert "http" not in history.replace("https://docs", "")


def test_labels_and_health_check(image: str) -> None:
    config = json.loads(docker("inspect", image))[0]["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "dstack-mesh"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])
    version = docker("run", "--rm", image, "version", "--json")
    assert labels["org.opencontainers.image.version"] in version
    assert config["Healthcheck"]["Test"] == ["CMD", "dstack-mesh", "await", "--timeout", "4"]
    assert set(config["ExposedPorts"]) == {"80/tcp", "443/tcp"}


def test_the_versions_are_the_pinned_ones(image: str) -> None:
    pinned = dict(
        line.lower().split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    line = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(docker("run", "--rm", image, "/opt/dstack-mesh/bin/python3", "-c", line))
    assert found.pop("dstack-mesh")
    assert {
        name: pinned[name.replace("-", "_")] if name.replace("-", "_") in pinned else pinned[name]
        for name in found
    } == found


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("BACKEND", "inbound.backend"), ("DSTACK_MESH_BACKEND", "inbound.backend")),
        *(("MESH_BACKEND", "inbound.backend"), ("GATEWAY_DOMAIN", "dstack.gateway_domain")),
        ("DSTACK_GATEWAY_DOMAIN", "dstack.gateway_domain"),
    ],
)
def test_older_environment_names(image: str, name: str, key: str) -> None:
    told = json.loads(
        docker("run", "--rm", "-e", f"{name}=some.host:8080", image, "config", "--json")
    )
    assert told[key]["value"] == "some.host:8080"


@pytest.mark.parametrize(
    ("command", "said"),
    [(["bash", "-c", "echo $((6 * 7))"], "42"), (["dstack-mesh", "version"], "0.1")],
)
def test_other_programs(image: str, command: list[str], said: str) -> None:
    assert said in docker("run", "--rm", image, *command)


def test_wrong_settings_end_it_in_one_line(image: str) -> None:
    ran = subprocess.run(
        ["docker", "run", "--rm", "-e", "MESH_BACKEND=nonsense:x", image],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.startswith("dstack-mesh: MESH_BACKEND is ")
    assert ran.stderr.count("\n") == 1


def users(stack: Stack, service: str) -> dict[str, tuple[int, str, str]]:
    """Give (uid, effective capabilities, groups) of each process in a container, by its command."""
    line = (
        "for p in /proc/[0-9]*; do"
        " echo \"$(tr '\\0' ' ' <$p/cmdline)|$(awk '/^Uid/{u=$2} /^CapEff/{c=$2}"
        ' /^Groups/{$1="";g=$0} END{print u"|"c"|"g}\' $p/status)"; done'
    )
    found = {}
    for text in stack.bash(service, line, check=False).splitlines():
        command, uid, capabilities, groups = text.rsplit("|", 3)
        if command.strip() and not command.startswith(("bash", "tr ", "awk ")):
            found[command.strip()] = (int(uid), capabilities, groups.strip())
    return found


def of(found: dict[str, tuple[int, str, str]], part: str) -> list[tuple[int, str, str]]:
    return [who for command, who in found.items() if part in command]


def test_what_talks_to_the_world_has_no_rights(stack: Stack) -> None:
    found = users(stack, "billing-mesh")
    nothing = "0" * 16
    assert of(found, "dstack_mesh run") == [(8091, nothing, "")]
    if stack.mode == "nginx":
        assert {who[:2] for who in of(found, "nginx:")} == {(8443, nothing)}
    assert {who[1] for who in of(found, "image.bridge")} == {nothing}


@pytest.mark.parametrize(
    ("owner", "mode", "bridge", "groups"),
    [
        *(("0:0", "0666", None, ""), ("0:999", "0660", None, "999")),
        *(("0:0", "0600", 0, ""), ("1234:1234", "0600", 1234, "")),
    ],
)
def test_the_agents_socket_of_any_mode(
    stack: Stack, owner: str, mode: str, bridge: int | None, groups: str
) -> None:
    socket = "/sim/shop/dstack.sock"
    stack.bash("sim", f"chown {owner} {socket} && chmod {mode} {socket}")
    try:
        stack.compose("restart", "-t", "5", "shop-mesh")
        stack.works_again()
        assert stack.curl("http://dstack-mesh/info").status == 200
        found = users(stack, "shop-mesh")
        assert of(found, "dstack_mesh run") == [(8091, "0" * 16, groups)]
        assert [who[0] for who in of(found, "image.bridge")] == ([] if bridge is None else [bridge])
    finally:
        stack.bash("sim", f"chown 0:0 {socket} && chmod 0755 {socket}")


def test_nginxs_key_is_in_memory_and_nginxs_alone(stack: Stack) -> None:
    if stack.mode != "nginx":
        assert stack.bash("billing-mesh", "ls /dev/shm/dstack-mesh/identity", check=False) == ""
        return
    line = (
        "stat -c '%a %u %n' /dev/shm/dstack-mesh/identity/current/key.pem; stat -f -c %T /dev/shm"
    )
    told, kind = stack.bash("billing-mesh", line).splitlines()
    assert told.startswith("600 8443 ")
    assert kind == "tmpfs"
    asked = "curl -s --unix-socket /dev/shm/dstack-mesh/auth/auth.sock http://x/health"
    for user, reached in (("8443:8443", True), ("8091:8091", True), ("1000:1000", False)):
        ran = docker(
            "exec", "-u", user, stack.container("billing-mesh"), "bash", "-c", asked, check=False
        )
        assert (ran == "OK\n") is reached, user


def test_low_ports_where_the_kernel_guards_them(image: str) -> None:
    """Elsewhere than in docker's own networks: one capability, and still no root."""
    name = "mesh-test-low-ports"
    docker("rm", "-f", name, check=False)
    docker(
        *("run", "-d", "--name", name, "--sysctl", "net.ipv4.ip_unprivileged_port_start=1024"),
        image,
    )
    try:
        line = "curl -s http://127.0.0.1/health"
        eventually(lambda: docker("exec", name, "sh", "-c", line, check=False), lambda s: s != "")
        told = docker("exec", name, "sh", "-c", "grep -hE '^(Uid|CapEff)' /proc/[0-9]*/status")
        assert "8091\t8091\t8091\t8091\nCapEff:\t0000000000000400" in told
    finally:
        docker("rm", "-f", name)


def test_as_another_user_from_the_start(image: str) -> None:
    name = "mesh-test-user"
    docker("rm", "-f", name, check=False)
    docker("run", "-d", "--name", name, "--user", "1234:1234", image)
    try:
        line = "curl -s http://127.0.0.1/health"
        eventually(lambda: docker("exec", name, "sh", "-c", line, check=False), lambda s: s != "")
        assert docker("exec", name, "id", "-u").strip() == "1234"
    finally:
        docker("rm", "-f", name)
