"""Callers, rules and requests for tests of policy, by hand and arbitrary."""

from __future__ import annotations

from hypothesis import strategies as st

from dstack_mesh.model import AppId, AppInfo, PeerIdentity
from dstack_mesh.policy.allow import Allow
from dstack_mesh.policy.rule import INFO_CONDITIONS, Rule

OWN, FRIEND, STRANGER = AppId("0" * 40), AppId("f" * 40), AppId("5" * 40)
APPS = (OWN, FRIEND, STRANGER)
HASHES = ("1" * 64, "2" * 64)
INSTANCES = ("3" * 40, "4" * 40)
METHODS = ("GET", "HEAD", "POST", "DELETE")
PATTERNS = ("/", "/a", "/a/*", "/a/**", "/**", "/*/b", "/b*", "/@a", "/a%20*")
PATHS = (
    *("/", "/a", "/a/", "/a/b", "/a/b/c", "/b", "/bb", "/%61", "/%40a", "/@a", "/a%20b", "*"),
    *("/a/../b", "//a", "/a%2fb", "/a?b=//", "/A", "/c"),
)


def caller(app: AppId = FRIEND, info: dict[str, str] | None = None) -> PeerIdentity:
    """Give a caller; what `info` does not name is not in its app info."""
    if info is None:
        return PeerIdentity(app, 4_000_000_000.0)
    said = {name: info.get(name, "") for name in INFO_CONDITIONS}
    return PeerIdentity(app, 4_000_000_000.0, AppInfo(app_id=app, **said))


def accepted(name: str) -> tuple[str, ...]:
    return INSTANCES if name == "instance_id" else HASHES


def _some(values: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...] | None]:
    lists = st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True).map(tuple)
    return st.none() | lists


APP_LISTS = st.sampled_from(["any", "self", FRIEND, f"self,{STRANGER}", f"{FRIEND},{STRANGER}"])


@st.composite
def rules(draw: st.DrawFn, most: int = 4) -> tuple[Rule, ...]:
    """Make some rules with some conditions each."""
    made = []
    for number in range(draw(st.integers(0, most))):
        apps = draw(st.none() | APP_LISTS)
        rule = Rule(
            name=f"r{number}",
            action=draw(st.sampled_from(["allow", "allow", "deny", "audit"])),
            apps=None if apps is None else Allow.parse(apps),
            methods=draw(_some(METHODS)),
            paths=draw(_some(PATTERNS)),
            compose_hash=draw(_some(HASHES)),
            os_image_hash=draw(st.none() | _some(HASHES)),
            device_id=draw(st.none() | _some(HASHES)),
            instance_id=draw(st.none() | _some(INSTANCES)),
        )
        made.append(rule)
    return tuple(made)


INFOS = st.none() | st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from(accepted(name)) for name in INFO_CONDITIONS},
)
CALLERS = st.builds(caller, st.sampled_from(APPS), INFOS)
REQUESTS = st.tuples(st.sampled_from([*METHODS, "get", "PURGE"]), st.sampled_from(PATHS))
