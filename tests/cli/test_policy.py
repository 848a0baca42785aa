"""`policy explain`: what it says, as text and as JSON, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstack_mesh.cli import main

OWN, FRIEND, STRANGER = "0" * 40, "f" * 40, "5" * 40
HASH = "ab" * 32

BY_NONE = (
    "no rule lets it through; rules ask for os_image_hash, instance_id, which its certificate does"
    " not tell"
)
FILE = f"""
[inbound]
backend = "app:80"
[[inbound.rule]]
name = "own"
action = "allow"
apps = ["self"]
[[inbound.rule]]
name = "may read"
action = "allow"
apps = ["{FRIEND}"]
methods = ["GET"]
paths = ["/api/*"]
[[inbound.rule]]
name = "watched"
action = "audit"
paths = ["/open"]
[[inbound.rule]]
name = "this image"
action = "allow"
os_image_hash = ["{HASH}"]
instance_id = ["{"3" * 40}"]
[[inbound.route]]
host = "files"
backend = "files:81"
"""


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_ALLOWED_APPS", raising=False)
    monkeypatch.delenv("MESH_POLICY_MODE", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.toml"
    path.write_text(FILE)
    return path


def explain(
    capsys: pytest.CaptureFixture[str], file: Path, *args: str, app: str = FRIEND
) -> tuple[int, dict[str, Any]]:
    status = main(["policy", "explain", "-c", str(file), "--app", app, "--json", *args])
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    assert found["allowed"] == (status == 0)
    return status, found


def test_let_through(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    assert explain(capsys, file, "--method", "GET", "--path", "/api/x?y") == (
        0,
        {
            "allowed": True,
            "decision": "allow",
            "rule": "may read",
            "why": 'the rule "may read" lets it through',
            "code": None,
            "backend": "app:80",
        },
    )


def test_denied(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    status, found = explain(capsys, file, "--method", "PUT", "--path", "/api/x")
    assert (status, found["decision"], found["rule"]) == (1, "deny", None)
    assert (found["code"], found["backend"]) == ("policy_denied", None)
    assert "no rule lets it through" in found["why"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            ["--path", "/api/x"],
            'let through, to app:80: the rule "may read" lets it through',
        ),
        (
            ["--path", "/api/x", "--host", "FILES:8080"],
            'let through, to files:81: the rule "may read" lets it through',
        ),
        (
            ["--path", "/open", "--method", "PUT"],
            'let through, and audited, to app:80: the rule "watched" audits it',
        ),
        (["--path", "/health"], "let through: the mesh answers /health itself"),
        (
            ["--path", "/x"],
            f"denied (policy_denied): app {FRIEND} may not make this request: {BY_NONE}",
        ),
    ],
)
def test_one_line(
    capsys: pytest.CaptureFixture[str], file: Path, args: list[str], line: str
) -> None:
    status = main(["policy", "explain", "-c", str(file), "--app", FRIEND, *args])
    assert (status, capsys.readouterr().out) == (int("denied" in line), f"{line}\n")


def test_who_we_are(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    x = ("--path", "/x")
    assert explain(capsys, file, *x, app="self")[1]["rule"] == "own"
    assert explain(capsys, file, *x, "--own-app", STRANGER, app="self")[1]["rule"] == "own"
    assert explain(capsys, file, *x, "--own-app", STRANGER.upper(), app=STRANGER)[0] == 0
    for app in (STRANGER, "0" * 40, "1" * 40):
        assert explain(capsys, file, *x, app=app)[0] == 1


def test_app_info(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    x = ("--path", "/x", "--method", "PUT")
    image, instance = ("--os-image-hash", HASH.upper()), ("--instance-id", "3" * 40)
    assert explain(capsys, file, *x, *image, *instance)[1]["rule"] == "this image"
    assert explain(capsys, file, *x, *image)[0] == 1
    assert explain(capsys, file, *x, *image, "--instance-id", "4" * 40)[0] == 1
    assert explain(capsys, file, *x, "--compose-hash", HASH, "--device-id", HASH)[0] == 1


def test_what_is_not_in_normal_form(
    capsys: pytest.CaptureFixture[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ("--path", "/x/../api/y")
    status, found = explain(capsys, file, *bad)
    assert (status, found["code"], found["rule"]) == (1, "bad_request", None)
    nginx = file.with_name("nginx.toml")
    nginx.write_text(f"{FILE[: FILE.index('[[inbound.route')]}")
    monkeypatch.setenv("MESH_INBOUND_MODE", "nginx")
    assert explain(capsys, nginx, *bad)[1]["code"] == "policy_denied"


def test_routes_by_path_refuse_whatever_policy_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(
        "[inbound]\nbackend = 'a:1'\n[[inbound.route]]\npath = '/b/**'\nbackend = 'b:1'"
    )
    assert explain(capsys, file, "--path", "/b")[1]["backend"] == "b:1"
    status, found = explain(capsys, file, "--path", "/b/../c")
    assert (status, found["code"], found["backend"]) == (1, "bad_request", None)
    file.write_text(f"{file.read_text()}\n[[inbound.rule]]\naction = 'deny'")
    assert explain(capsys, file, "--path", "/b/../c")[1]["code"] == "policy_denied"


def test_the_environment_counts(
    capsys: pytest.CaptureFixture[str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_ALLOWED_APPS", "self")
    assert explain(capsys, file, "--path", "/api/x")[0] == 1
    monkeypatch.setenv("MESH_POLICY_MODE", "audit")
    arguments = ["policy", "explain", "-c", str(file), "--app", FRIEND, "--path", "/api/x"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("let through, and audited, to app:80: ")
    assert captured.err.startswith('warning: MESH_POLICY_MODE is "audit"')


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--path", "/"], "Missing option '--app'"),
        (["--app", FRIEND], "Missing option '--path'"),
        (["--app", "f" * 39, "--path", "/"], "'--app': 'fff"),
        (["--app", FRIEND, "--path", "api"], "'--path': 'api'"),
        (["--app", FRIEND, "--path", "/a b"], "'--path': '/a b'"),
        (["--app", FRIEND, "--path", "/\u00e9"], "'--path': '/\\xe9'"),
        (["--app", FRIEND, "--path", "/", "--method", "G T"], "'--method': 'G T'"),
        (["--app", FRIEND, "--path", "/", "--method", ""], "'--method': ''"),
        (["--app", FRIEND, "--path", "/", "--host", ""], "'--host': ''"),
        (["--app", FRIEND, "--path", "/", "--own-app", "self"], "'--own-app': 'self'"),
        (["--app", FRIEND, "--path", "/", "--compose-hash", "ab"], "'--compose-hash': 'ab'"),
        (["--app", FRIEND, "--path", "/", "--instance-id", "x"], "'--instance-id': 'x'"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], file: Path, args: list[str], says: str
) -> None:
    assert main(["policy", "explain", "-c", str(file), *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err


def test_wrong_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[[inbound.rule]]\naction = 'allow'\napps = []")
    assert main(["policy", "explain", "-c", str(file), "--app", FRIEND, "--path", "/"]) == 2
    assert "inbound.rule 1: apps" in capsys.readouterr().err
