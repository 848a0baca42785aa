"""The decision: may this caller make this request. Pure, and the same for all who ask it."""

from __future__ import annotations

from dstack_mesh.model import AppId, PeerIdentity
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.path import PathError, normal_path
from dstack_mesh.policy.rule import INFO_CONDITIONS, CompiledRule, Rule, info_value


class Decision:
    """What policy says to one request. Never changed once made."""

    __slots__ = ("allowed", "audited", "malformed", "rule", "why")

    def __init__(
        self, allowed: bool, audited: bool, rule: str | None, why: str, malformed: bool = False
    ) -> None:
        self.allowed = allowed
        """Whether the request goes through."""
        self.audited = audited
        """Whether it goes through only to be counted and logged."""
        self.rule = rule
        """The name of the rule that decided, or None."""
        self.why = why
        """What decided, for a reader."""
        self.malformed = malformed
        """Whether the target is one that no rule can be held against."""

    @property
    def verdict(self) -> str:
        """`allow`, `deny` or `audit`, as decisions are counted."""
        if self.audited:
            return "audit"
        return "allow" if self.allowed else "deny"


_NO_RULES = Decision(True, False, None, "there are no rules, and the app may call")


class Policy:
    """Who may call (`allow`), and what (`rules`): both must let a request through. Frozen.

    `audit` is the policy mode: everything is let through, and what would not be is audited.
    """

    __slots__ = (
        "_info",
        "_needs_method",
        "_needs_path",
        "_rules",
        "allow",
        "asks_who_only",
        "audit",
    )

    def __init__(self, allow: Allow, rules: tuple[Rule, ...] = (), *, audit: bool = False) -> None:
        self.allow = allow
        self.audit = audit
        self.asks_who_only = not rules
        """Whether only the caller's app matters, so that one answer holds for a connection."""
        self._rules = [(CompiledRule(rule), _let_through(rule)) for rule in rules]
        self._needs_method = any(rule.methods is not None for rule in rules)
        self._info = [name for name in INFO_CONDITIONS if any(getattr(r, name) for r in rules)]
        self._needs_path = any(rule.paths is not None for rule in rules)

    def decide(self, caller: PeerIdentity, own: AppId, method: bytes, target: bytes) -> Decision:
        """Decide over a request of the verified `caller` to us, the app `own`.

        `own` is `rule.UNKNOWN` while it is not known. `method` and `target` (path and query) are
        as they were sent; empty is absent, and where a rule needs it the answer is no.
        """
        if not self.allow.permits(caller.app_id, own):
            return self._no(None, self.allow.denial(caller.app_id))
        if self.asks_who_only:
            return _NO_RULES
        if (self._needs_method and not method) or (self._needs_path and not target):
            return self._no(None, _NOT_NAMED)
        path = ""
        if self._needs_path:
            try:
                path = normal_path(target)
            except PathError as error:
                return self._no(None, NOT_NORMAL.format(error), malformed=True)
        for rule, let_through in self._rules:
            if rule.applies(caller, own, method, path):
                if let_through is not None:
                    return let_through
                by_rule = f'the rule "{rule.name}" denies it'
                return self._no(rule.name, self._denial(caller, by_rule))
        return self._no(None, self._denial(caller, "no rule lets it through"))

    def _denial(self, caller: PeerIdentity, reason: str) -> str:
        hidden = [name for name in self._info if not info_value(caller.app_info, name)]
        if hidden:
            reason += f"; rules ask for {', '.join(hidden)}, which its certificate does not tell"
        return f"app {caller.app_id} may not make this request: {reason}"

    def _no(self, rule: str | None, why: str, *, malformed: bool = False) -> Decision:
        return Decision(self.audit, self.audit, rule, why, malformed)


NOT_NORMAL = (
    "the path is not in normal form: {}. A backend could take it for another path, so where rules"
    " or routes go by paths it is refused; send it without //, dot segments, backslashes and"
    " encoded dots, slashes or backslashes"
)


_NOT_NAMED = (
    "rules ask for the method or the path, and nginx named none in x-original-method or"
    " x-original-uri"
)


def _let_through(rule: Rule) -> Decision | None:
    """Make the decision that `rule` always gives, if it lets through."""
    if rule.action == "allow":
        return Decision(True, False, rule.name, f'the rule "{rule.name}" lets it through')
    if rule.action == "audit":
        return Decision(True, True, rule.name, f'the rule "{rule.name}" audits it')
    return None
