"""docker and docker-compose as a user has them, each call with a time limit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "example" / "docker-compose.yml"
ADDRESSES = Path(__file__).with_name("addresses.yml")
IMAGE = "dstack-mesh:dev"
CLIENT_IMAGE = "dstack-mesh-example-client:dev"
BUILD_SECONDS = 900

T = TypeVar("T")


def need_docker() -> None:
    """Skip where docker does not answer; where nothing may be left out, fail."""
    if shutil.which("docker") and _answers("docker", "info") and _compose() is not None:
        return
    reason = "docker, docker-compose or docker's daemon is not there"
    assert os.environ.get("CI") != "true", reason
    pytest.skip(reason)


def _answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _compose() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and _answers(*command, "version"):
            return command
    return None


def docker(*args: str, timeout: float = 60, check: bool = True) -> str:
    """Run docker and give its standard output."""
    ran = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=timeout)
    assert not check or ran.returncode == 0, (args, ran.stdout, ran.stderr)
    return ran.stdout


def build_images() -> None:
    """Build the image and the example's client; what is there already is not built again."""
    script = REPOSITORY / "tests" / "container" / "image"
    ran = subprocess.run([script, IMAGE], capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert ran.returncode == 0, ran.stderr
    client = str(REPOSITORY / "example" / "client")
    docker("build", "--quiet", "--tag", CLIENT_IMAGE, client, timeout=BUILD_SECONDS)


def eventually(read: Callable[[], T], good: Callable[[T], bool], seconds: float = 30) -> T:
    """Call `read` until `good` takes what it gives; the last one is in the failure."""
    deadline = time.monotonic() + seconds
    while True:
        found = read()
        if good(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


@dataclass
class Answer:
    """What curl in a container got."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def error(self) -> str:
        return self.headers.get("x-dstack-mesh-error", "")

    @property
    def fields(self) -> dict[str, list[str]]:
        """The header fields that the backend got, as it tells them."""
        assert self.status == 200, self
        found: dict[str, list[str]] = {}
        for name, value in json.loads(self.body)["headers"]:
            found.setdefault(name.lower(), []).append(value)
        return found


@dataclass
class Stack:
    """The example, running under a project name of its own."""

    project: str
    mode: str
    environ: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = (EXAMPLE,)

    def compose(self, *args: str, timeout: float = 120, check: bool = True) -> str:
        command = _compose()
        assert command is not None
        files = [part for file in self.files for part in ("-f", str(file))]
        ran = subprocess.run(
            [*command, *files, "-p", self.project, *args],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "MESH_INBOUND_MODE": self.mode, **self.environ},
        )
        assert not check or ran.returncode == 0, (args, ran.stdout, ran.stderr, self._told())
        return ran.stdout

    def _told(self) -> str:
        """Give the containers' logs for a failure's message."""
        return self.compose("logs", "--no-color", "--tail", "40", check=False)

    def up(self) -> None:
        self.compose("up", "-d", timeout=180)

    def down(self) -> None:
        self.compose("down", "-v", "--timeout", "2", check=False)

    def container(self, service: str) -> str:
        """Give the id of a service's container, which may have ended."""
        found = docker(
            *("ps", "-aq", "--filter", f"label=com.docker.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).split()
        assert len(found) == 1, (service, found)
        return found[0]

    def inspect(self, service: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(docker("inspect", self.container(service)))[0]
        return found

    def address(self, service: str, network: str) -> str:
        """Give a container's address in one of the example's networks."""
        form = f'{{{{(index .NetworkSettings.Networks "{self.project}_{network}").IPAddress}}}}'
        return docker("inspect", "-f", form, self.container(service)).strip()

    def log(self, service: str) -> str:
        ran = subprocess.run(
            ["docker", "logs", self.container(service)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
        )
        return ran.stdout

    def bash(self, service: str, line: str, *, timeout: float = 60, check: bool = True) -> str:
        """Run a line of shell in a container, as the image's own user."""
        return docker(
            *("exec", self.container(service), "bash", "-o", "pipefail", "-c", line),
            timeout=timeout,
            check=check,
        )

    def curl(self, arguments: str, *, at: str = "client", timeout: float = 60) -> Answer:
        """Call with curl in a container; a connection that fails is status 0."""
        text = self.bash(at, f"curl -s -m 20 -i {arguments}", timeout=timeout, check=False)
        head, _, body = text.replace("\r\n", "\n").partition("\n\n")
        while head.startswith("HTTP/1.1 100"):
            head, _, body = body.partition("\n\n")
        first, *lines = head.split("\n")
        pairs = (line.partition(": ") for line in lines)
        headers = {name.lower(): value for name, _, value in pairs}
        return Answer(int(first.split()[1]) if first else 0, headers, body)

    def call(self, path: str = "/api/data", options: str = "") -> Answer:
        """Have shop's client call billing."""
        return self.curl(f'-H "x-dstack-target-app: $APP_ID" {options} http://dstack-mesh{path}')

    def works_again(self, seconds: float = 20) -> float:
        """Wait until calls are answered as before; the seconds it took."""
        began = time.monotonic()
        eventually(self.call, lambda answer: answer.status == 200, seconds)
        return time.monotonic() - began
