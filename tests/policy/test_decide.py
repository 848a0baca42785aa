"""The decision: by hand, and against a slow reading of the contract's sentences."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policy.cases import (
    APP_LISTS,
    CALLERS,
    FRIEND,
    HASHES,
    INFOS,
    OWN,
    REQUESTS,
    STRANGER,
    caller,
    rules,
)
from tests.policy.test_path import is_normal, slow, units

from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.decide import Policy
from dstack_mesh.policy.rule import INFO_CONDITIONS, UNKNOWN, Rule

ANYONE = Allow(anyone=True)
READ = Rule("may read", "allow", apps=Allow.parse(FRIEND), methods=("GET",), paths=("/api/**",))
NOT_SECRET = Rule("not the secret", "deny", paths=("/api/secret/**",))
WATCH = Rule("watched", "audit", apps=Allow.parse(STRANGER))


def decide(
    policy: Policy, who: AppId = FRIEND, method: str = "GET", path: str = "/api/x"
) -> tuple[str, str | None]:
    decision = policy.decide(caller(who), OWN, method.encode(), path.encode())
    assert decision.allowed == (decision.verdict != "deny")
    assert decision.audited == (decision.verdict == "audit")
    return decision.verdict, decision.rule


def test_without_rules_only_who_calls_counts() -> None:
    policy = Policy(Allow.parse(FRIEND))
    assert policy.asks_who_only
    assert decide(policy) == ("allow", None)
    assert decide(policy, path="/a/../b") == ("allow", None)
    assert decide(policy, STRANGER) == ("deny", None)
    why = policy.decide(caller(STRANGER), OWN, b"GET", b"/").why
    assert STRANGER in why
    assert "MESH_ALLOWED_APPS" in why


def test_both_must_let_a_caller_through() -> None:
    policy = Policy(Allow.parse(f"self,{STRANGER}"), (Rule("all", "allow"),))
    assert decide(policy, OWN) == ("allow", "all")
    assert decide(policy, FRIEND) == ("deny", None)
    policy = Policy(Allow.parse(f"{FRIEND},{STRANGER}"), (READ,))
    assert not policy.asks_who_only
    assert decide(policy, FRIEND) == ("allow", "may read")
    assert decide(policy, STRANGER) == ("deny", None)


def test_the_first_that_matches_decides() -> None:
    first = Policy(ANYONE, (NOT_SECRET, READ))
    assert decide(first, path="/api/x") == ("allow", "may read")
    assert decide(first, path="/api/secret") == ("deny", "not the secret")
    last = Policy(ANYONE, (READ, NOT_SECRET))
    assert decide(last, path="/api/secret") == ("allow", "may read")


def test_what_no_rule_matches_is_denied() -> None:
    for rule in (READ, NOT_SECRET, WATCH):
        assert decide(Policy(ANYONE, (rule,)), path="/other") == ("deny", None)
    why = Policy(ANYONE, (READ,)).decide(caller(), OWN, b"PUT", b"/api/x").why
    assert why == f"app {FRIEND} may not make this request: no rule lets it through"


def test_a_denial_names_its_rule() -> None:
    why = Policy(ANYONE, (NOT_SECRET, READ)).decide(caller(), OWN, b"GET", b"/api/secret").why
    assert why == f'app {FRIEND} may not make this request: the rule "not the secret" denies it'


def test_a_rule_that_audits_lets_through() -> None:
    assert decide(Policy(ANYONE, (WATCH, READ)), STRANGER) == ("audit", "watched")


def test_audit_mode_lets_through_what_it_would_deny() -> None:
    policy = Policy(Allow.parse(f"self,{FRIEND}"), (NOT_SECRET, READ), audit=True)
    assert decide(policy) == ("allow", "may read")
    assert decide(policy, path="/api/secret") == ("audit", "not the secret")
    assert decide(policy, path="/other") == ("audit", None)
    assert decide(policy, STRANGER) == ("audit", None)
    assert decide(policy, path="/api/../x") == ("audit", None)
    assert decide(Policy(Allow(), audit=True)) == ("audit", None)


@pytest.mark.parametrize("rule", [READ, NOT_SECRET])
def test_where_rules_go_by_paths_a_path_must_be_in_normal_form(rule: Rule) -> None:
    policy = Policy(ANYONE, (Rule("all", "allow", methods=("GET",)), rule))
    decision = policy.decide(caller(), OWN, b"GET", b"/x/%2e%2e/y")
    assert (decision.verdict, decision.malformed, decision.rule) == ("deny", True, None)
    assert "'%2e' is in it" in decision.why
    without = Policy(ANYONE, (Rule("all", "allow", methods=("GET",)),))
    assert decide(without, path="/x/%2e%2e/y") == ("allow", "all")
    # Who may not call at all is not told about paths.
    strangers = Policy(Allow.parse(STRANGER), (rule,)).decide(caller(), OWN, b"GET", b"//")
    assert not strangers.malformed


def test_where_a_rule_needs_what_nginx_did_not_say_the_answer_is_no() -> None:
    everything = Rule("all", "allow")
    by_method, by_path = Rule("m", "deny", methods=("PUT",)), Rule("p", "deny", paths=("/a",))
    for rules_, method, target, expected in (
        ((everything,), b"", b"", "allow"),
        ((everything, by_method), b"", b"/", "deny"),
        ((everything, by_method), b"GET", b"", "allow"),
        ((everything, by_path), b"GET", b"", "deny"),
        ((everything, by_path), b"", b"/", "allow"),
    ):
        decision = Policy(ANYONE, rules_).decide(caller(), OWN, method, target)
        assert decision.verdict == expected
        assert ("x-original-uri" in decision.why) == (expected == "deny")


def test_a_denial_says_what_the_certificate_does_not_tell() -> None:
    attested = Rule("attested", "allow", compose_hash=HASHES, device_id=HASHES[:1])
    policy = Policy(ANYONE, (attested,))
    assert policy.decide(caller(), OWN, b"", b"").why.endswith(
        "no rule lets it through; rules ask for compose_hash, device_id, which its certificate"
        " does not tell"
    )
    half = caller(info={"compose_hash": "9" * 64})
    assert policy.decide(half, OWN, b"", b"").why.endswith(
        "rules ask for device_id, which its certificate does not tell"
    )
    whole = caller(info={"compose_hash": "9" * 64, "device_id": HASHES[0]})
    assert policy.decide(whole, OWN, b"", b"").why.endswith("no rule lets it through")


# Against the contract, read slowly.

Fits = Literal["yes", "no", "unknown"]


def fits(rule: Rule, who: PeerIdentity, own: AppId, method: str, path: str) -> Fits:
    """Say whether all of a rule's conditions fit: yes, no, or it cannot be known."""
    found: set[Fits] = set()
    if rule.apps is not None:
        ids = set(re.split(",", rule.apps.text))
        named = "any" in ids or who.app_id in ids or ("self" in ids and who.app_id == own)
        found.add("yes" if named else "unknown" if "self" in ids and own == UNKNOWN else "no")
    if rule.methods is not None:
        alike = method.upper() in rule.methods
        found.add("yes" if method in rule.methods else "unknown" if alike else "no")
    if rule.paths is not None:
        plain = path.replace("%40", "@")
        exact = any(slow(units(pattern), units(path)) for pattern in rule.paths)
        alike = any(slow(units(p.replace("%40", "@")), units(plain)) for p in rule.paths)
        found.add("yes" if exact else "unknown" if alike else "no")
    for name in INFO_CONDITIONS:
        wanted = getattr(rule, name)
        value = getattr(who.app_info, name) if who.app_info is not None else ""
        if wanted is not None:
            found.add("unknown" if not value else "yes" if value in wanted else "no")
    return "no" if "no" in found else "unknown" if "unknown" in found else "yes"


def slow_decision(
    allow: str, all_rules: tuple[Rule, ...], who: PeerIdentity, own: AppId, method: str, target: str
) -> tuple[str, str | None]:
    ids = allow.split(",")
    if not ("any" in ids or who.app_id in ids or ("self" in ids and who.app_id == own)):
        return "deny", None
    if not all_rules:
        return "allow", None
    path = target.partition("?")[0]
    if any(rule.paths for rule in all_rules) and path != "*" and not is_normal(path):
        return "deny", None
    for rule in all_rules:
        said = fits(rule, who, own, method, path)
        if said == "yes" or (said == "unknown" and rule.action == "deny"):
            return rule.action, rule.name
    return "deny", None


OWNS = st.sampled_from([OWN, OWN, UNKNOWN])


@given(APP_LISTS, rules(), CALLERS, OWNS, REQUESTS, st.booleans())
def test_decisions_are_what_the_contract_says(
    allow: str,
    all_rules: tuple[Rule, ...],
    who: PeerIdentity,
    own: AppId,
    asked: tuple[str, str],
    audit: bool,
) -> None:
    method, target = asked
    policy = Policy(Allow.parse(allow), all_rules, audit=audit)
    decision = policy.decide(who, own, method.encode(), target.encode())
    expected, rule = slow_decision(allow, all_rules, who, own, method, target)
    if audit and expected == "deny":
        expected = "audit"
    assert (decision.verdict, decision.rule) == (expected, rule)
    assert decision.why


@given(rules(), CALLERS, INFOS, REQUESTS)
def test_who_tells_less_of_itself_is_never_let_through_more(
    all_rules: tuple[Rule, ...],
    who: PeerIdentity,
    info: dict[str, str] | None,
    asked: tuple[str, str],
) -> None:
    """What would be denied for what the app info says is denied without it."""
    method, target = asked[0].encode(), asked[1].encode()
    policy = Policy(ANYONE, all_rules)
    silent = policy.decide(caller(who.app_id), OWN, method, target)
    for told in (who, caller(who.app_id, info)):
        assert policy.decide(told, OWN, method, target).allowed or not silent.allowed


@given(rules(), INFOS.filter(bool), st.data(), REQUESTS)
def test_nor_is_who_leaves_out_one_thing(
    all_rules: tuple[Rule, ...], info: dict[str, str], data: st.DataObject, asked: tuple[str, str]
) -> None:
    method, target = asked[0].encode(), asked[1].encode()
    hidden = data.draw(st.sampled_from(sorted(info)))
    less = {name: value for name, value in info.items() if name != hidden}
    policy = Policy(ANYONE, all_rules)
    if policy.decide(caller(FRIEND, less), OWN, method, target).allowed:
        assert policy.decide(caller(FRIEND, info), OWN, method, target).allowed


@given(rules(), CALLERS, REQUESTS)
def test_not_knowing_who_we_are_never_lets_more_through(
    all_rules: tuple[Rule, ...], who: PeerIdentity, asked: tuple[str, str]
) -> None:
    method, target = asked[0].encode(), asked[1].encode()
    for allow in ("any", "self"):
        policy = Policy(Allow.parse(allow), all_rules)
        unknown = policy.decide(who, UNKNOWN, method, target)
        for own in (OWN, FRIEND, STRANGER):
            assert policy.decide(who, own, method, target).allowed or not unknown.allowed


@given(rules(), CALLERS, REQUESTS)
def test_a_rule_that_denies_never_lets_more_through(
    all_rules: tuple[Rule, ...], who: PeerIdentity, asked: tuple[str, str]
) -> None:
    """Nowhere in the list, except by asking for a path, which refuses, too."""
    method, target = asked[0].encode(), asked[1].encode()
    without = tuple(rule for rule in all_rules if rule.action != "deny")
    if not without:
        return
    stricter = Policy(ANYONE, all_rules).decide(who, OWN, method, target)
    assert not stricter.allowed or Policy(ANYONE, without).decide(who, OWN, method, target).allowed
