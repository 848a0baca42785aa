"""`dstack-mesh policy explain`: what policy says to a request, without a mesh that runs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dstack_mesh.model import AppId, AppInfo, PeerIdentity
from dstack_mesh.settings.load import load_settings
from dstack_mesh.wire.fields import is_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from dstack_mesh.policy.decide import Decision

_F = TypeVar("_F", bound="Callable[..., Any]")
_SELF = "self"
_SOME_APP, _ANOTHER_APP = AppId("0" * 40), AppId("1" * 40)
_target = re.compile(r"[!\"$-~]+").fullmatch
_host = re.compile(r"[!-~]+").fullmatch


def _checked(good: Callable[[str], object], accepted: str) -> Callable[..., str | None]:
    """Make a callback of an option that holds its value, if there is one, against `good`."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None and not good(value):
            raise click.BadParameter(f"{value!a}: accepted is {accepted}", ctx, param)
        return value

    return check


_id = re.compile(r"[0-9A-Fa-f]{40}").fullmatch
_id_or_self = re.compile(r"[0-9A-Fa-f]{40}|self").fullmatch
_hash = re.compile(r"[0-9A-Fa-f]{64}").fullmatch


def _hash_option(name: str) -> Callable[[_F], _F]:
    check = _checked(_hash, "64 hex digits")
    return click.option(name, callback=check, metavar="HEX", help="Of the caller's app info.")


@click.group
def policy() -> None:
    """Explain what the policy decides about a request."""


@policy.command
@click.option("-c", "--config", type=click.Path(path_type=Path), help="The settings file (TOML).")
@click.option(
    "--app",
    required=True,
    callback=_checked(_id_or_self, "40 hex digits, or self"),
    metavar="ID",
    help="The caller's app-id, or self for this very app.",
)
@click.option(
    "--method",
    default="GET",
    show_default=True,
    callback=_checked(lambda text: text.isascii() and is_token(text.encode()), "a method"),
    help="The request's method.",
)
@click.option(
    "--path",
    required=True,
    callback=_checked(
        lambda text: _target(text) and (text.startswith("/") or text == "*"),
        "a path as it is sent, percent-encoded; a query may follow",
    ),
    help="The request's path, as it is sent.",
)
@click.option(
    "--host",
    callback=_checked(_host, "a host name, a port may follow"),
    help="The request's Host, for routes.",
)
@click.option(
    "--own-app",
    callback=_checked(_id, "40 hex digits"),
    metavar="ID",
    help="This app's own app-id.  [default: another than the caller's]",
)
@_hash_option("--compose-hash")
@_hash_option("--os-image-hash")
@_hash_option("--device-id")
@click.option(
    "--instance-id",
    callback=_checked(_id, "40 hex digits"),
    metavar="ID",
    help="Of the caller's app info.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    config: Path | None,
    app: str,
    method: str,
    path: str,
    host: str | None,
    own_app: str | None,
    as_json: bool,
    **info: str | None,
) -> int:
    """Tell whether a caller's request is let through, by which rule, and to which backend.

    The settings are those that `run` would have: the file's and the environment's. Without any of
    the app info options the caller shows no app info: a condition on it cannot be evaluated.

    Exit status: 0 let through, 1 denied, 2 wrong usage or settings.
    """
    # What is missing on this machine plays no part here.
    loaded = load_settings({}, os.environ, config, exists=lambda _: True)
    from dstack_mesh.inbound.compiled import compile_inbound
    from dstack_mesh.policy.decide import Decision
    from dstack_mesh.policy.path import PathError

    rules, routes = compile_inbound(loaded.settings.inbound)
    caller, own = _identities(app, own_app, info)
    target = path.encode("ascii")
    decision = rules.decide(caller, own, method.encode("ascii"), target)
    backend = loaded.settings.inbound.backend
    if method in ("GET", "HEAD") and path.partition("?")[0] == "/health":
        decision, backend = Decision(True, False, None, "the mesh answers /health itself"), None
    else:
        try:
            backend = routes.choose(host.encode("ascii") if host else None, target) or backend
        except PathError as error:
            decision = _refused_by_routes(decision, error)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    answer = {
        "allowed": decision.allowed,
        "decision": decision.verdict,
        "rule": decision.rule,
        "why": decision.why,
        "code": None if decision.allowed else _code(decision, loaded.settings.inbound.mode),
        "backend": str(backend) if backend is not None and decision.allowed else None,
    }
    click.echo(json.dumps(answer, indent=2) if as_json else _line(answer))
    return 0 if decision.allowed else 1


def _identities(
    app: str, own_app: str | None, info: dict[str, str | None]
) -> tuple[PeerIdentity, AppId]:
    """Give the caller and our own app-id; what is not said of the app info is not in it."""
    app = app.lower()
    own = _SOME_APP if app != _SOME_APP else _ANOTHER_APP
    if own_app is not None:
        own = AppId(own_app.lower())
    app_id = own if app == _SELF else AppId(app)
    said = {name: (value or "").lower() for name, value in info.items()}
    app_info = AppInfo(app_id=app_id, **said) if any(said.values()) else None
    return PeerIdentity(app_id, float("inf"), app_info), own


def _refused_by_routes(decision: Decision, error: ValueError) -> Decision:
    """Routes that go by paths refuse what policy, in audit mode or without paths, may let pass."""
    from dstack_mesh.policy.decide import NOT_NORMAL

    if not decision.allowed:
        return decision
    return type(decision)(False, False, None, NOT_NORMAL.format(error), malformed=True)


def _code(decision: Decision, mode: str) -> str:
    return "bad_request" if decision.malformed and mode != "nginx" else "policy_denied"


def _line(answer: dict[str, object]) -> str:
    verdict = {"allow": "let through", "audit": "let through, and audited", "deny": "denied"}
    to = f", to {answer['backend']}" if answer["backend"] else ""
    code = f" ({answer['code']})" if answer["code"] else ""
    return f"{verdict[str(answer['decision'])]}{code}{to}: {answer['why']}"
