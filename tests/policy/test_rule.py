"""One rule: which requests it is the rule for."""

from __future__ import annotations

from typing import Any

import pytest
from tests.policy.cases import FRIEND, HASHES, INSTANCES, OWN, STRANGER, caller

from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.path import normal_path
from dstack_mesh.policy.rule import INFO_CONDITIONS, UNKNOWN, CompiledRule, Rule, info_value

LETS_THROUGH = ("allow", "audit")
EVERY = (*LETS_THROUGH, "deny")


def applies(
    action: str,
    who: PeerIdentity | None = None,
    *,
    method: str = "GET",
    path: str = "/a",
    own: AppId = OWN,
    **conditions: Any,
) -> bool:
    rule = CompiledRule(Rule("r", action, **conditions))  # type: ignore[arg-type]
    return rule.applies(who or caller(), own, method.encode(), normal_path(path.encode()))


@pytest.mark.parametrize("action", EVERY)
def test_without_conditions_it_is_for_everybody(action: str) -> None:
    assert applies(action)
    assert applies(action, caller(STRANGER, {}), method="x", path="*", own=UNKNOWN)


@pytest.mark.parametrize("action", EVERY)
def test_every_condition_must_fit(action: str) -> None:
    fitting: dict[str, Any] = {
        "apps": Allow.parse(FRIEND),
        "methods": ("GET", "PUT"),
        "paths": ("/b", "/a"),
        "compose_hash": (HASHES[0],),
        "os_image_hash": HASHES,
        "device_id": (HASHES[1],),
        "instance_id": INSTANCES,
    }
    others: dict[str, Any] = {
        "apps": Allow.parse(STRANGER),
        "methods": ("PUT",),
        "paths": ("/b",),
        "compose_hash": (HASHES[1],),
        "os_image_hash": ("9" * 64,),
        "device_id": ("9" * 64,),
        "instance_id": ("9" * 40,),
    }
    info = {
        "compose_hash": HASHES[0],
        "os_image_hash": HASHES[1],
        "device_id": HASHES[1],
        "instance_id": INSTANCES[0],
    }
    who = caller(FRIEND, info)
    assert applies(action, who, **fitting)
    for name, other in others.items():
        assert applies(action, who, **{name: fitting[name]})
        assert not applies(action, who, **{**fitting, name: other}), name


@pytest.mark.parametrize("action", EVERY)
def test_self(action: str) -> None:
    own = Allow.parse(f"self,{FRIEND}")
    assert applies(action, caller(OWN), apps=own)
    assert applies(action, caller(FRIEND), apps=own)
    assert not applies(action, caller(STRANGER), apps=own)


def test_what_cannot_be_evaluated_fits_only_where_it_denies() -> None:
    for name in INFO_CONDITIONS:
        value = INSTANCES[:1] if name == "instance_id" else HASHES[:1]
        for who in (caller(), caller(info={}), caller(info={"x": "y"})):
            assert applies("deny", who, **{name: value})
            for action in LETS_THROUGH:
                assert not applies(action, who, **{name: value})
        assert not applies("deny", **{name: value, "methods": ("PUT",)})
        assert not applies("deny", path="/b", **{name: value, "paths": ("/a",)})
    known_not_to = {"compose_hash": HASHES[:1], "device_id": HASHES[:1]}
    assert not applies("deny", caller(info={"device_id": HASHES[1]}), **known_not_to)


def test_self_while_we_do_not_know_who_we_are() -> None:
    for own in ("self", f"self,{STRANGER}"):
        assert applies("deny", own=UNKNOWN, apps=Allow.parse(own))
        for action in LETS_THROUGH:
            assert not applies(action, own=UNKNOWN, apps=Allow.parse(own))
    assert not applies("deny", own=UNKNOWN, apps=Allow.parse(STRANGER))
    assert applies("allow", caller(STRANGER), own=UNKNOWN, apps=Allow.parse(f"self,{STRANGER}"))


def test_a_method_in_another_case_is_the_same_only_where_it_denies() -> None:
    assert applies("deny", method="get", methods=("GET",))
    assert applies("deny", method="Get", methods=("GET",))
    for action in LETS_THROUGH:
        assert not applies(action, method="get", methods=("GET",))


def test_a_path_that_many_read_as_the_same_is_so_only_where_it_denies() -> None:
    for pattern, path in (("/@a", "/%40a"), ("/%40a", "/@a"), ("/*;x", "/a%3Bx")):
        assert applies("deny", path=path, paths=(pattern,))
        for action in LETS_THROUGH:
            assert not applies(action, path=path, paths=(pattern,))


@pytest.mark.parametrize("name", ["methods", "paths", *INFO_CONDITIONS])
def test_an_empty_condition_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is empty"):
        Rule("r", "allow", **{name: ()})  # type: ignore[arg-type]


def test_a_path_that_nothing_matches_is_an_error() -> None:
    with pytest.raises(ValueError, match="is in it"):
        Rule("r", "deny", paths=("/a", "/b/../c"))


def test_what_app_info_says() -> None:
    info = caller(info={name: name for name in INFO_CONDITIONS}).app_info
    assert [info_value(info, name) for name in INFO_CONDITIONS] == list(INFO_CONDITIONS)
    assert {info_value(None, name) for name in INFO_CONDITIONS} == {""}
