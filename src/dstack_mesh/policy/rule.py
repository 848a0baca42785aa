"""One rule: its conditions as they are written, and whether a request fits them. Pure.

A condition fits, does not fit, or cannot be evaluated: the caller shows no app info, say. A rule
that lets through needs every condition to fit; for a rule that denies it is enough that none is
known not to. So what cannot be evaluated never lets anybody through (docs/policy.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dstack_mesh.model import AppId, AppInfo, PeerIdentity
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.path import PathSet, plain_path

Action = Literal["allow", "deny", "audit"]

INFO_CONDITIONS = ("compose_hash", "os_image_hash", "device_id", "instance_id")
"""What the caller's app info can be asked for; names of `AppInfo` and of `Rule`."""

UNKNOWN = AppId("")
"""Our own app-id while it is not known; equal to no caller's."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as it was written. A condition that is None is none; an empty one is an error.

    Raises `ValueError` for what can never be meant.
    """

    name: str
    action: Action
    apps: Allow | None = None
    methods: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None
    """Patterns, see `path.Pattern`."""

    compose_hash: tuple[str, ...] | None = None
    os_image_hash: tuple[str, ...] | None = None
    device_id: tuple[str, ...] | None = None
    instance_id: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("methods", "paths", *INFO_CONDITIONS):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is empty")
        PathSet(self.paths or ())


class CompiledRule:
    """A rule made ready to be asked about each request."""

    __slots__ = ("_anyone", "_apps", "_denies", "_info", "_methods", "_paths", "name")

    def __init__(self, rule: Rule) -> None:
        self.name = rule.name
        self._denies = rule.action == "deny"
        self._apps = rule.apps if rule.apps is not None else Allow(anyone=True)
        self._anyone = self._apps.anyone
        self._methods = (
            frozenset(method.encode("ascii") for method in rule.methods) if rule.methods else None
        )
        self._paths = PathSet(rule.paths, plain=self._denies) if rule.paths else None
        self._info = tuple(
            (name, frozenset(values))
            for name, values in zip(
                INFO_CONDITIONS,
                (rule.compose_hash, rule.os_image_hash, rule.device_id, rule.instance_id),
                strict=True,
            )
            if values is not None
        )

    def applies(self, caller: PeerIdentity, own: AppId, method: bytes, path: str) -> bool:
        """Tell whether the rule is the one that decides; `path` is in normal form.

        For a rule that denies, a method in another case is the same, and so is a path that differs
        only in what is encoded: some backends see it so.
        """
        denies = self._denies
        if not (self._anyone or self._apps.permits(caller.app_id, own)):
            unknown = self._apps.own and own == UNKNOWN
            if not (denies and unknown):
                return False
        methods = self._methods
        if methods is not None and (method.upper() if denies else method) not in methods:
            return False
        paths = self._paths
        if paths is not None and not paths.matches(plain_path(path) if denies else path):
            return False
        return not self._info or self._info_applies(caller.app_info)

    def _info_applies(self, info: AppInfo | None) -> bool:
        for name, accepted in self._info:
            value = info_value(info, name)
            if value == "":  # what is not there is not evaluated
                if not self._denies:
                    return False
            elif value not in accepted:
                return False
        return True


def info_value(info: AppInfo | None, name: str) -> str:
    """Give what the app info says in `name`; empty where it says nothing."""
    if info is None:
        return ""
    if name == "compose_hash":
        return info.compose_hash
    if name == "os_image_hash":
        return info.os_image_hash
    return info.device_id if name == "device_id" else info.instance_id
