"""What is built where: with a compiler, without one, and when the compiler fails."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.compiled import NEEDS_PYTHON, arguments
from tests.integration.harness import Client, request
from tests.integration.processes import SidecarProcess, sidecar_process
from tools.build_hook import CustomBuildHook

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.world import World
from tools import build_backend

ROOT = Path(__file__).parents[2]
COMPILERS = {"mypy>=1.14", "setuptools>=70", "msgspec>=0.19"}

FAKE_COMPILE = """
import sys
from pathlib import Path
for source in sys.argv[2:]:
    path = Path(source)
    assert path.exists(), path
    path.with_name(path.stem + ".cpython-fake.so").write_bytes(b"compiled")
Path("dstack_mesh__mypyc.cpython-fake.so").write_bytes(b"compiled")
with Path("../../../compilations").open("a") as file:
    file.write("one ")
Path("build/left").mkdir(parents=True)
Path("build/left/over.so").write_bytes(b"not for the wheel")
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have a machine with no command but those that the test puts into this folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("DSTACK_MESH_PURE", raising=False)
    return folder


@pytest.fixture
def header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have Python.h where the build looks for it."""
    path = tmp_path / "include" / "Python.h"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(build_backend.sysconfig, "get_paths", lambda: {"include": str(path.parent)})
    return path


def command(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def compilers() -> set[str]:
    """Give what a wheel's build wants for compiling."""
    return COMPILERS & set(build_backend.get_requires_for_build_wheel())


def test_with_a_compiler_mypyc_is_wanted(machine: Path, header: Path) -> None:
    command(machine, "cc")
    assert compilers() == COMPILERS


def test_without_a_compiler_it_is_not_and_that_is_said(
    machine: Path, header: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not compilers()
    assert capsys.readouterr().err == (
        "no C compiler (cc): the wheel will be pure Python, and slower\n"
    )


def test_without_pythons_header_neither(
    machine: Path, header: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(machine, "cc")
    header.unlink()
    assert not compilers()
    assert f"no {header} (Debian: python3-dev)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "wanted"), [("1", False), ("yes", False), ("0", True)])
def test_pure_python_can_be_asked_for(
    machine: Path, header: Path, monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    command(machine, "cc")
    monkeypatch.setenv("DSTACK_MESH_PURE", value)
    assert bool(compilers()) is wanted


@pytest.mark.parametrize(
    ("value", "there", "wanted"),
    [
        ("", "cc", True),
        ("clang", "clang", True),
        ("clang", "cc", False),
        ("ccache gcc -m64", "ccache", True),
    ],
)
def test_the_compiler_that_cc_names_is_the_one(
    machine: Path,
    header: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    there: str,
    wanted: bool,
) -> None:
    command(machine, there)
    monkeypatch.setenv("CC", value)
    assert bool(compilers()) is wanted


def test_editable_installs_and_sdists_never_want_it() -> None:
    assert not COMPILERS & set(build_backend.get_requires_for_build_editable())
    assert not COMPILERS & set(build_backend.get_requires_for_build_sdist())


@pytest.mark.parametrize("pattern", build_backend.COMPILED)
def test_what_is_to_be_compiled_is_there(pattern: str) -> None:
    assert list((ROOT / "src").glob(pattern))


@pytest.mark.parametrize("name", NEEDS_PYTHON)
def test_what_is_left_out_with_the_compiled_package_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    assert not test or f"def {test}(" in (ROOT / file).read_text()
    given = arguments()
    assert (file in given, f"--deselect={name}" in given) == (bool(test), bool(test))


# Whole builds, in a copy of the sources.


class Checkout:
    """A copy of what a build reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "tools"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / name)
        self.environ = {**os.environ, "PYTHONPATH": str(folder / "tools")}
        self.environ.pop("DSTACK_MESH_PURE", None)

    def build(self, what: str = "build_wheel") -> subprocess.CompletedProcess[str]:
        (self.folder / "dist").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", f"import build_backend as b; print(b.{what}('dist'))"],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    def files(self, wheel: str) -> dict[str, bytes]:
        with zipfile.ZipFile(self.folder / "dist" / wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def leave_compiled(self) -> None:
        """Leave what an earlier build has compiled."""
        folder = self.folder / "build" / "compiled" / "src" / "dstack_mesh"
        folder.mkdir(parents=True)
        (folder / "old.so").write_bytes(b"of other sources")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def ours(files: dict[str, bytes]) -> set[str]:
    """Give the names of the package's files, but for what is compiled."""
    return {name for name in files if ".dist-info/" not in name and not name.endswith(".so")}


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "dstack_mesh").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


def test_a_pure_wheel_has_the_sources_and_nothing_else(checkout: Checkout) -> None:
    checkout.leave_compiled()
    checkout.environ["DSTACK_MESH_PURE"] = "1"
    done = checkout.build()
    assert done.returncode == 0, done.stderr
    wheel = done.stdout.split()[-1]
    assert wheel.endswith("-py3-none-any.whl")
    files = checkout.files(wheel)
    assert ours(files) == sources()
    assert not any(name.endswith(".so") for name in files)


def test_a_compiled_wheel_has_libraries_beside_the_sources(
    checkout: Checkout, machine: Path
) -> None:
    command(machine, "cc")
    checkout.environ["PATH"] = str(machine)
    checkout.leave_compiled()
    (checkout.folder / "tools" / "compile_modules.py").write_text(FAKE_COMPILE)
    done = checkout.build()
    assert done.returncode == 0, done.stderr
    wheel = done.stdout.split()[-1]
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{version}-{version}-linux_" in wheel
    files = checkout.files(wheel)
    assert ours(files) == sources()
    libraries = {name for name in files if name.endswith(".so")}
    assert {
        "dstack_mesh__mypyc.cpython-fake.so",
        "dstack_mesh/relay/exchange.cpython-fake.so",
        "dstack_mesh/wire/_take_apart.cpython-fake.so",
        "dstack_mesh/wire/request.cpython-fake.so",
    } <= libraries
    assert not {name for name in libraries if "old" in name or "over" in name or "app." in name}
    assert not {name for name in libraries if "__init__" in name}
    meta = next(data for name, data in files.items() if name.endswith("/WHEEL"))
    assert b"Root-Is-Purelib: false" in meta
    assert not list((checkout.folder / "src").rglob("*.so")), "the sources are left as they were"


def test_the_same_sources_are_compiled_once(checkout: Checkout, machine: Path) -> None:
    """pip builds a wheel twice: once to learn its name."""
    command(machine, "cc")
    checkout.environ["PATH"] = str(machine)
    (checkout.folder / "tools" / "compile_modules.py").write_text(FAKE_COMPILE)
    for expected in ("one ", "one ", "one one "):
        if expected != "one ":
            with (checkout.folder / "src" / "dstack_mesh" / "wire" / "usual.py").open("a") as file:
                file.write("# changed\n")
        done = checkout.build()
        assert done.returncode == 0, done.stderr
        wheel = checkout.files(done.stdout.split()[-1])
        assert "dstack_mesh/wire/usual.cpython-fake.so" in wheel
        assert (checkout.folder / "compilations").read_text() == expected


def test_a_build_that_cannot_compile_fails(checkout: Checkout, machine: Path) -> None:
    command(machine, "cc")
    checkout.environ["PATH"] = str(machine)
    (checkout.folder / "tools" / "compile_modules.py").write_text("raise SystemExit('too bad')")
    done = checkout.build()
    assert done.returncode != 0
    assert "too bad" in done.stderr
    assert not list((checkout.folder / "dist").iterdir()), "no wheel that is silently pure"


@pytest.mark.parametrize(("version", "found"), [("standard", 1), ("editable", 0)])
def test_an_editable_install_is_pure_whatever_lies_about(
    tmp_path: Path, version: str, found: int
) -> None:
    folder = tmp_path / "build" / "compiled" / "src" / "dstack_mesh"
    folder.mkdir(parents=True)
    (folder / "x.so").touch()
    hook = CustomBuildHook(str(tmp_path), {}, None, None, "", "wheel")  # type: ignore[arg-type]
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, data)
    assert len(data["force_include"]) == found
    assert ("infer_tag" in data) is bool(found)


# The real thing: a minute or two.


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the folder of the compiled package: what `make compiled` has built, or a new one."""
    given = os.environ.get("DSTACK_MESH_COMPILED", "")
    if given:
        yield Path(given).resolve()
        return
    if not build_backend._can_compile():
        pytest.skip("there is no C compiler, or no Python.h")
    folder = tmp_path_factory.mktemp("compiled")
    checkout = Checkout(folder / "checkout")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["-q", "--no-deps", "--target", str(folder / "package"), str(checkout.folder)]
    subprocess.run([*pip, "install", *quiet], timeout=1500, check=True)
    yield folder / "package"


def in_package(package: Path, code: str) -> Any:
    """Give what `code` prints, as JSON, in a process that has the package."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.compiled
@pytest.mark.timeout(1800)
def test_all_that_is_named_is_compiled(package: Path) -> None:
    named = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for pattern in build_backend.COMPILED
        for path in (ROOT / "src").glob(pattern)
        if path.name != "__init__.py"
    ]
    assert "dstack_mesh.relay.exchange" in named
    found = in_package(
        package,
        "import importlib; "
        f"print(json.dumps([importlib.import_module(n).__file__ for n in {named!r}]))",
    )
    assert len(found) > 30
    assert all(file.endswith(".so") and Path(file).is_relative_to(package) for file in found)
    code = "from dstack_mesh.wire import take_apart as t; print(json.dumps(t._compiled.__name__))"
    assert in_package(package, code) == "dstack_mesh.wire._take_apart"


def is_compiled(sidecar: SidecarProcess) -> bool:
    """Tell whether the running process has the library loaded."""
    return "dstack_mesh__mypyc" in Path(f"/proc/{sidecar.process.pid}/maps").read_text()


@pytest.mark.compiled
@pytest.mark.timeout(1800)
async def test_sidecars_of_it_carry_requests(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(package))
    backend = Backend("b")
    address = str(await backend.start())
    try:
        async with World(["a", "b"], tmp_path) as world, asyncio.timeout(40):
            a, b = world.apps["a"], world.apps["b"]
            async with (
                sidecar_process(a.directory, a.env) as caller,
                sidecar_process(b.directory, {**b.env, "MESH_BACKEND": address}) as target,
            ):
                assert all(map(is_compiled, (caller, target)))
                await echo(caller.address("outbound"), a.app_id, b.app_id)
    finally:
        await backend.aclose()


async def echo(sidecar: TcpAddress, caller: str, target: str) -> None:
    """Send requests on one connection, and look at what the backend saw."""
    async with Client.connect(sidecar) as client:
        fields = [("x-dstack-target-app", target)]
        known = False
        while not known:  # where the gateway is, it may have to learn yet
            await client.send(request(headers=fields))
            known = (await client.answer()).error != "gateway_unknown"
        for number in range(3):
            await client.send(request("POST", f"/echo?{number}", fields, b"x" * 70_000))
            answer = await client.answer("POST")
            assert answer.status == 200
            seen = json.loads(answer.body)
            assert seen["target"] == f"/echo?{number}"
            assert ["x-dstack-app-id", caller] in seen["headers"]
