from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_mesh.model import AppId
from dstack_mesh.policy.allow import Allow

OWN = AppId("0" * 40)
FRIEND = AppId("f" * 40)
STRANGER = AppId("5" * 40)


@pytest.mark.parametrize(
    ("text", "through"),
    [
        ("any", {OWN, FRIEND, STRANGER}),
        (" any ", {OWN, FRIEND, STRANGER}),
        ("any,any", {OWN, FRIEND, STRANGER}),
        ("self", {OWN}),
        (FRIEND, {FRIEND}),
        (FRIEND.upper(), {FRIEND}),
        (f"self, {FRIEND}", {OWN, FRIEND}),
        (f"{FRIEND},{STRANGER} , {FRIEND}", {FRIEND, STRANGER}),
    ],
)
def test_who_is_let_through(text: str, through: set[AppId]) -> None:
    allow = Allow.parse(text)
    assert {app for app in (OWN, FRIEND, STRANGER) if allow.permits(app, OWN)} == through
    assert Allow.parse(allow.text) == allow


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty: accepted are any, self"),
        ("  ", "it is empty"),
        (",", "one of its items is empty"),
        (f"{FRIEND},", "one of its items is empty"),
        (f"any,{FRIEND}", "any together with others"),
        ("any,self", "any together with others"),
        ("ANY", "'ANY' is no app-id: accepted are any, self, or app-ids"),
        ("none", "'none' is no app-id"),
        ("f" * 39, "is no app-id"),
        ("f" * 41, "is no app-id"),
        ("g" * 40, "is no app-id"),
        ("٤" * 40, "is no app-id"),
        (f"{FRIEND} {STRANGER}", "is no app-id"),
        (f"self,{FRIEND}\nx", "is no app-id"),
        ("x" * 5000, r"'x{57}\.\.\.' is no app-id"),
    ],
)
def test_what_cannot_be_read_is_an_error(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Allow.parse(text)


def test_an_empty_policy_lets_nobody_through() -> None:
    assert not any(Allow().permits(app, OWN) for app in (OWN, FRIEND, STRANGER))


def test_a_denial_names_the_caller_and_the_setting_and_not_the_list() -> None:
    said = Allow.parse(FRIEND).denial(STRANGER)
    assert STRANGER in said
    assert "MESH_ALLOWED_APPS" in said
    assert FRIEND not in said


ITEM = st.sampled_from(["any", "self", FRIEND, OWN, STRANGER.upper(), "", "x"]) | st.text()


@given(st.lists(ITEM, max_size=5).map(",".join), st.sampled_from([OWN, FRIEND, STRANGER]))
def test_nobody_is_let_through_who_is_not_written_there(text: str, caller: AppId) -> None:
    try:
        allow = Allow.parse(text)
    except ValueError:
        return
    assert Allow.parse(allow.text) == allow
    items = {item.strip().lower() for item in text.split(",")}
    named = "any" in items or caller in items or ("self" in items and caller == OWN)
    assert allow.permits(caller, OWN) == named
