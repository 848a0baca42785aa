"""The coarse policy: which apps may call at all (`MESH_ALLOWED_APPS`, interface.md). Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dstack_mesh.model import AppId

_APP_ID = re.compile(r"[0-9A-Fa-f]{40}")
_ACCEPTED = "any, self, or app-ids of 40 hex digits, comma separated"


@dataclass(frozen=True, slots=True)
class Allow:
    """Who may call: any app under our KMS, our own app, apps by their ids. Frozen.

    Without an argument it lets nobody through.
    """

    anyone: bool = False
    own: bool = False
    apps: frozenset[AppId] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Allow:
        """Read `any`, or `self` and app-ids, comma separated. Raises ValueError with a reason.

        An empty item is an error: it is more likely a variable that was not filled in than the
        wish to let nobody, or everybody, through.
        """
        items = [item.strip() for item in text.split(",")]
        if "" in items:
            what = "it is empty" if len(items) == 1 else "one of its items is empty"
            raise ValueError(f"{what}: accepted are {_ACCEPTED}")
        if "any" in items:
            if set(items) != {"any"}:
                raise ValueError("any together with others: any lets every app through; leave it")
            return cls(anyone=True)
        ids = [item for item in items if item != "self"]
        for item in ids:
            if _APP_ID.fullmatch(item) is None:
                raise ValueError(f"{_shown(item)} is no app-id: accepted are {_ACCEPTED}")
        return cls(own="self" in items, apps=frozenset(AppId(item.lower()) for item in ids))

    @property
    def text(self) -> str:
        """The setting in its normal form; `parse` reads it back."""
        return (
            "any"
            if self.anyone
            else ",".join([*(["self"] if self.own else []), *sorted(self.apps)])
        )

    def permits(self, caller: AppId, own: AppId) -> bool:
        """Tell whether the verified app `caller` may call us, the app `own`."""
        return self.anyone or caller in self.apps or (self.own and caller == own)

    def denial(self, caller: AppId) -> str:
        """Say why `caller` is not let through, for the `detail` of `policy_denied`.

        The list itself stays out: a stranger need not learn who else may call.
        """
        return f"app {caller} is not among the apps that may call this one (MESH_ALLOWED_APPS)"


def _shown(item: str) -> str:
    return ascii(item if len(item) <= 60 else f"{item[:57]}...")
