"""Rules and routes in the file: what is read, and what is refused in which words."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from tests.policy.cases import FRIEND, HASHES, INSTANCES, rules

from dstack_mesh.model import TcpAddress, UnixAddress
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.route import Route
from dstack_mesh.policy.rule import Rule
from dstack_mesh.settings import render
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import Loaded, load_settings
from dstack_mesh.settings.rules import plain, toml_lines

HEAD = "[inbound]\nbackend = 'a:1'\n"
RULE = "[[inbound.rule]]\n"
ROUTE = "[[inbound.route]]\n"


def load(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> Loaded:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    return load_settings({}, environ or {}, file, exists=lambda _: True)


def error(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, text, environ)
    message = str(caught.value)
    assert message.isprintable()
    assert "mesh.toml" in message
    return message


def test_the_contracts_example(tmp_path: Path) -> None:
    text = f"""
        [inbound]
        backend = "backend-app:8080"
        policy_mode = "audit"

        [[inbound.rule]]
        name = "billing may read"
        action = "allow"
        apps = ["self", "{FRIEND.upper()}"]
        methods = ["GET", "HEAD"]
        paths = ["/api/*", "/healthz"]
        compose_hash = ["{"A" * 64}"]

        [[inbound.rule]]
        action = "audit"
        apps = "any"
        os_image_hash = "{HASHES[0]}"
        device_id = ["{HASHES[0]}", "{HASHES[1]}"]
        instance_id = ["{INSTANCES[0]}"]

        [[inbound.rule]]
        action = "deny"

        [[inbound.route]]
        host = "VPC-Server"
        path = "/api/*"
        backend = "http://b:1"

        [[inbound.route]]
        host = "::1"
        backend = "unix:/b.sock"
    """
    loaded = load(tmp_path, text)
    inbound = loaded.settings.inbound
    assert inbound.policy_mode == "audit"
    assert inbound.rules == (
        Rule(
            "billing may read",
            "allow",
            apps=Allow(own=True, apps=frozenset([FRIEND])),
            methods=("GET", "HEAD"),
            paths=("/api/*", "/healthz"),
            compose_hash=("a" * 64,),
        ),
        Rule(
            "rule 2",
            "audit",
            apps=Allow(anyone=True),
            os_image_hash=HASHES[:1],
            device_id=HASHES,
            instance_id=INSTANCES[:1],
        ),
        Rule("rule 3", "deny"),
    )
    assert inbound.routes == (
        Route(TcpAddress("b", 1), host="vpc-server", path="/api/*"),
        Route(UnixAddress("/b.sock"), host="[::1]"),
    )
    assert str(loaded.sources["inbound.rule"]).startswith("file ")
    (warning,) = loaded.warnings
    assert "policy denies nobody" in warning


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ''\naction = 'allow'", ['rule 1 "": name', 'is "": it is empty', "1 to 100"]),
        (f"name = '{'x' * 101}'\naction = 'deny'", ["rule 1", "name", "1 to 100 characters"]),
        ('name = "a\\nb"\naction = "deny"', ["rule 1", "name", "printable"]),
        ("name = 1\naction = 'deny'", ["rule 1: name", "is 1", "printable"]),
        ("name = 'x'", ['rule 1 "x"', "has no action", "allow, deny or audit"]),
        ("name = 'x'\naction = 'Allow'", ['rule 1 "x": action', '"Allow"', "allow, deny or audit"]),
        ("action = ['allow']", ["rule 1: action", "['allow']", "allow, deny or audit"]),
        ("action = 'allow'\npath = '/a'", ["rule 1: path", "no such key", "accepted are name"]),
        ("action = 'allow'\nApps = 'any'", ["Apps", "no such key"]),
        ("action = 'allow'\napps = []", ["apps", "is []", "it is empty", "leave the key out"]),
        ("action = 'allow'\napps = ''", ["apps", 'is ""', "it is empty"]),
        ("action = 'allow'\napps = ['']", ["apps", "is ['']", "it is empty"]),
        ("action = 'allow'\napps = ['self', '']", ["apps", "one of its items is empty"]),
        ("action = 'allow'\napps = [1]", ["apps", "is [1]", "app-ids of 40 hex digits"]),
        ("action = 'allow'\napps = ['any', 'self']", ["apps", "any together with others"]),
        ("action = 'allow'\napps = ['3f']", ["apps", "'3f' is no app-id", "40 hex digits"]),
        ("action = 'allow'\nmethods = []", ["methods", "is []", "it is empty"]),
        ("action = 'allow'\nmethods = ['get']", ["methods", '"get" is no method in upper case']),
        ("action = 'allow'\nmethods = ['GET,PUT']", ["methods", "is no method"]),
        ("action = 'allow'\nmethods = ['']", ["methods", '"" is no method']),
        ("action = 'allow'\nmethods = {}", ["methods", "is {}", "such as GET"]),
        ("action = 'allow'\npaths = []", ["paths", "it is empty"]),
        ("action = 'allow'\npaths = ['api']", ["paths", '"api": it does not begin with /']),
        ("action = 'allow'\npaths = ['/a', '/b/**/c']", ["paths", '"/b/**/c": ** is in it']),
        ("action = 'allow'\npaths = ['/a%2fb']", ["paths", "'%2f' is in it"]),
        ("action = 'allow'\ncompose_hash = []", ["compose_hash", "it is empty"]),
        ("action = 'allow'\ncompose_hash = ['ab']", ["compose_hash", "is not 64 hex digits"]),
        (f"action = 'allow'\ninstance_id = ['{'a' * 64}']", ["instance_id", "not 40 hex digits"]),
        (f"action = 'deny'\ndevice_id = ['{'g' * 64}']", ["device_id", "not 64 hex digits"]),
        (f"action = 'deny'\nos_image_hash = '0x{'a' * 62}'", ["os_image_hash", "64 hex"]),
        ("action = 'deny'\ncompose_hash = 1", ["compose_hash", "is 1", "64 hex digits"]),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    message = error(tmp_path, f"{HEAD}{RULE}{text}")
    assert [part for part in said if part not in message] == [], message
    assert message.startswith("inbound.rule 1"), message


def test_the_number_is_the_rules_own(tmp_path: Path) -> None:
    first = f"{HEAD}{RULE}action = 'allow'\nname = 'a'\n"
    assert error(tmp_path, f"{first}{RULE}action = 'x'").startswith("inbound.rule 2: action")
    message = error(tmp_path, f"{first}{RULE}action = 'allow'\nname = 'a'")
    assert message.startswith('inbound.rule 2 "a": name')
    assert "another rule's" in message
    message = error(tmp_path, f"{HEAD}{RULE}action = 'allow'\nname = 'rule 2'\n{RULE}action='deny'")
    assert message.startswith("inbound.rule 2: name")


@pytest.mark.parametrize("key", ["rule", "route"])
@pytest.mark.parametrize("value", ["[]", "'x'", "1", "{ }", "[1]"])
def test_what_is_no_tables(tmp_path: Path, key: str, value: str) -> None:
    message = error(tmp_path, f"{HEAD}{key} = {value}")
    assert message.startswith(f"inbound.{key}")
    assert "accepted" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host = 'a'", ["has no backend", "unix:/absolute/path"]),
        ("backend = 'a:1'", ["has no host and no path"]),
        ("host = ''\nbackend = 'a:1'", ["host", "it is empty"]),
        ("host = 'a:80'\nbackend = 'a:1'", ["host", '"a:80"', "without a port"]),
        ("host = '*.a'\nbackend = 'a:1'", ["host", "without a port"]),
        ("host = ['a']\nbackend = 'a:1'", ["host", "['a']"]),
        ("path = 'a'\nbackend = 'a:1'", ["path", "does not begin with /"]),
        ("path = '/a/**b'\nbackend = 'a:1'", ["path", "** is in it"]),
        ("path = '/a'\nbackend = 'a'", ["backend", '"a"', "host:port"]),
        ("paths = ['/a']\nbackend = 'a:1'", ["paths", "no such key", "host, path, backend"]),
        ("name = 'x'\npath = '/'\nbackend = 'a:1'", ["name", "no such key"]),
    ],
)
def test_a_wrong_route_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    message = error(tmp_path, f"{HEAD}{ROUTE}{text}")
    assert [part for part in said if part not in message] == [], message
    assert message.startswith("inbound.route 1"), message


def test_routes_and_what_goes_with_them(tmp_path: Path) -> None:
    route = f"{ROUTE}host = 'a'\nbackend = 'b:1'\n"
    assert "without inbound.backend" in error(tmp_path, route)
    message = error(tmp_path, HEAD + route, {"MESH_INBOUND_MODE": "nginx"})
    assert "MESH_INBOUND_MODE" in message
    assert "embedded" in message
    assert load(tmp_path, route, {"MESH_INBOUND_MODE": "off"}).settings.inbound.routes


def test_audit_mode_is_warned_of(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD).warnings == ()
    (warning,) = load(tmp_path, HEAD, {"MESH_POLICY_MODE": "audit"}).warnings
    assert warning.startswith('MESH_POLICY_MODE is "audit"')
    assert "MESH_ALLOWED_APPS" in warning


@given(rules())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_config_prints_reads_the_same(tmp_path: Path, made: tuple[Rule, ...]) -> None:
    loaded = load(tmp_path, HEAD + "\n".join(toml_lines("inbound.rule", made, "test")))
    assert loaded.settings.inbound.rules == made
    again = load(tmp_path, render.as_toml(loaded))
    assert again.settings == loaded.settings
    shown = render.as_json(loaded)["inbound.rule"]
    assert shown["value"] == [plain(rule) for rule in made]


def test_config_prints_names_that_need_quotes(tmp_path: Path) -> None:
    rule = Rule('"\u00e9" \\ #', "deny", paths=("/a*",))
    route = Route(UnixAddress("/b"), host="a.b", path="/x/**")
    text = "\n".join(
        [*toml_lines("inbound.rule", (rule,), "x"), *toml_lines("inbound.route", (route,), "x")]
    )
    inbound = load(tmp_path, HEAD + text).settings.inbound
    assert (inbound.rules, inbound.routes) == ((rule,), (route,))
    assert tomllib.loads(text)["inbound"]["route"][0] == plain(route)
