"""Paths and patterns, by hand and against a slow matcher that shares no line with the real one."""

from __future__ import annotations

import time
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dstack_mesh.policy.path import PathError, PathSet, Pattern, normal_path, plain_path

ENCODED_SPACE = chr(0x120)


def matches(pattern: str, path: str) -> bool:
    return Pattern(pattern).matches(normal_path(path.encode()))


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/", "/"),
        (b"*", "*"),
        (b"/a/b?c=/../d//e%2f", "/a/b"),
        (b"/?", "/"),
        (b"/%41%7e%2D%5f", "/A~-_"),
        (b"/%20x%20", f"/{ENCODED_SPACE}x{ENCODED_SPACE}"),
        (b"/%c3%a9%C3%A9", "/" + "\u01c3\u01a9" * 2),
        (b"/%252e", "/\u01252e"),
        (b"/.a/b./..c/...", "/.a/b./..c/..."),
        (b"/a;x/(b)!$&'*+,=:@[]^`{|}\"<>", "/a;x/(b)!$&'*+,=:@[]^`{|}\"<>"),
        (b"/a/", "/a/"),
    ],
)
def test_the_normal_form(target: bytes, path: str) -> None:
    assert normal_path(target) == path


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (b"", "does not begin with /"),
        (b"a", "does not begin with /"),
        (b"?/a", "does not begin with /"),
        (b"*/a", "does not begin with /"),
        (b"http://x/a", "does not begin with /"),
        (b"//", "'//' is in it"),
        (b"/a//b", "'//' is in it"),
        (b"/a//", "'//' is in it"),
        (b"/.", "'/.' is in it"),
        (b"/./a", "'/.' is in it"),
        (b"/a/..", "'/..' is in it"),
        (b"/a/../b", "'/..' is in it"),
        (b"/a/..?b", "'/..' is in it"),
        (b"/a/..;x/b", "'/..' is in it"),
        (b"/a/.;/b", "'/.' is in it"),
        (b"/a/..%3Bx/b", "'/..' is in it"),
        (b"/a%2fb", "'%2f' is in it"),
        (b"/a%2Fb", "'%2F' is in it"),
        (b"/a/%2e%2e/b", "'%2e' is in it"),
        (b"/a.%2E/b", "'%2E' is in it"),
        (b"/file%2etxt", "'%2e' is in it"),
        (b"/a%5cb", "'%5c' is in it"),
        (b"/a\\b", r"'\\\\' is in it"),
        (b"/a%00", "'%00' is in it"),
        (b"/a%", "'%' is in it"),
        (b"/a%4", "'%4' is in it"),
        (b"/a%4gx", "'%4g' is in it"),
        (b"/a%%41", "'%%4' is in it"),
        (b"/a#b", "'#' is in it"),
        (b"/a b", "' ' is in it"),
        (b"/a\r\nb", r"'\\r' is in it"),
        (b"/\xc3\xa9", r"'\\xc3' is in it"),
        (b"/a\x7f", r"'\\x7f' is in it"),
    ],
)
def test_what_could_mean_another_path(target: bytes, says: str) -> None:
    with pytest.raises(PathError, match=says):
        normal_path(target)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/", ["/"], ["/a", "*"]),
        ("/healthz", ["/healthz", "/%68ealthz"], ["/healthz/", "/Healthz", "/health", "/"]),
        ("/api/*", ["/api/x", "/api/%20", "/api/.x"], ["/api", "/api/", "/api/x/y", "/apix", "/"]),
        ("/*", ["/a"], ["/", "/a/", "*"]),
        ("/v*/x", ["/v1/x", "/v12/x"], ["/v/x", "/x1/x", "/v1/2/x", "/v1/x/"]),
        ("/*.js", ["/a.js", "/.js.js"], ["/.js", "/a.jsx", "/a/b.js"]),
        ("/a*b*c", ["/axbxc", "/abbcc", "/a-bb-c"], ["/abc", "/axbc", "/abxc", "/axxc"]),
        ("/*a*", ["/xax", "/aaa"], ["/a", "/ax", "/xa", "/aa"]),
        ("/**", ["/", "/a", "/a/", "/a/b/c"], ["*"]),
        ("/api/**", ["/api", "/api/", "/api/x", "/api/x/y/"], ["/apix", "/ap", "/", "/x/api"]),
        ("/*/x/**", ["/a/x", "/a/x/y/z"], ["/x", "/a/xy", "/x/x1"]),
        ("/a/*/", ["/a/b/"], ["/a/b", "/a//".replace("//", "/")]),
        ("/%41%20b", ["/A%20b", "/%41%20b"], ["/A"]),
        ("/caf%c3%A9*", ["/caf%C3%A9s"], ["/caf%C3%A9", "/caf"]),
        ("/a*0", ["/ax0", "/a%400"], ["/a%40", "/a%20"]),
        ("/a%2A", ["/a%2a"], ["/ab", "/a*"]),
    ],
)
def test_what_a_pattern_matches(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [path for path in yes if not matches(pattern, path)] == []
    assert [path for path in no if matches(pattern, path)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begin with /"),
        ("api", "begin with /"),
        ("*", "is no path"),
        ("/a?b", "is no path"),
        ("/a?", "is no path"),
        ("/a/../b", "is in it"),
        ("/a//b", "is in it"),
        ("/a%2fb", "is in it"),
        ("/a b", "is in it"),
        ("/caf\u00e9", "is not ASCII"),
        ("/a/**/b", r"\*\* is in it"),
        ("/a**", r"\*\* is in it"),
        ("/**/**", r"\*\* is in it"),
        ("/a/***", r"\*\* is in it"),
    ],
)
def test_what_is_no_pattern(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pattern(text)
    with pytest.raises(ValueError, match=says):
        PathSet(("/a", text))


def test_a_set_matches_what_one_of_it_does() -> None:
    one = PathSet(("/a", "/b/*", "/c/**"))
    found = [path for path in ("/a", "/b/x", "/c", "/b", "/d", "/") if one.matches(path)]
    assert found == ["/a", "/b/x", "/c"]
    assert not PathSet(()).matches("/")


def test_the_plain_form_takes_what_may_stand_in_a_path_for_the_same() -> None:
    assert plain_path(normal_path(b"/%40me%3A%21%20")) == f"/@me:!{ENCODED_SPACE}"
    for path in (b"/users/@me", b"/users/%40me"):
        for text in ("/users/@me", "/users/%40me", "/users/*me", "/**"):
            assert Pattern(text, plain=True).matches(plain_path(normal_path(path)))
    star = Pattern("/a%2Ab", plain=True)
    assert star.matches("/a*b")
    assert not star.matches("/axb")


def test_no_path_makes_matching_slow() -> None:
    pattern = Pattern("/" + "*a" * 50 + "*b")
    path = "/" + "a" * 16_000
    began = time.perf_counter()
    for _ in range(20):
        assert not pattern.matches(path)
    assert time.perf_counter() - began < 1.0


# Against a slow matcher.


def units(path: str) -> list[str]:
    """Cut into characters, an encoding being one; unreserved ones are decoded."""
    found: list[str] = []
    rest = path
    while rest:
        size = 3 if rest[0] == "%" else 1
        one, rest = rest[:size], rest[size:]
        byte = unquote_to_bytes(one).decode("latin-1")
        plain = byte.isascii() and (byte.isalnum() or byte in "-._~")
        found.append(byte if plain or size == 1 else one.upper())
    return found


def slow(pattern: list[str], path: list[str]) -> bool:
    """Match by trying everything. `**` is two units that are `*`, behind a `/`, at the end."""
    if pattern == ["/", "*", "*"]:
        return not path or path[0] == "/"
    if not pattern:
        return not path
    if not path:
        return False
    if pattern[0] == "*":
        if path[0] == "/":
            return False
        return slow(pattern[1:], path[1:]) or slow(pattern, path[1:])
    return pattern[0] == path[0] and slow(pattern[1:], path[1:])


def is_normal(path: str) -> bool:
    """Decide by segments: what `normal_path` finds with one expression."""
    if not path.startswith("/") or not path.isascii() or not path.isprintable():
        return False
    if any(bad in path for bad in ("\\", "#", " ")):
        return False
    cut = path.split("%")
    for after in cut[1:]:
        hexes = after[:2].lower()
        if len(hexes) < 2 or not all(c in "0123456789abcdef" for c in hexes):
            return False
        if hexes in ("2e", "2f", "5c", "00"):
            return False
    *folders, last = path[1:].split("/")
    if "" in folders:
        return False
    names = (s.lower().replace("%3b", ";").partition(";")[0] for s in (*folders, last))
    return not any(name in (".", "..") for name in names)


PIECE = st.sampled_from(
    ["/", "/", "a", "b", "A", ".", "..", "%61", "%2f", "%2e", "%40", "@", "%3b", ";", "%", "0"]
)
PATH = st.lists(PIECE | st.characters(codec="latin-1"), max_size=10).map(lambda p: "/" + "".join(p))
PATTERN = st.lists(
    st.sampled_from(["/", "/", "a", "b", "A", "*", "*", "*a", "%61", "%40", "@", "/**", "0"]),
    max_size=8,
).map(lambda p: "/" + "".join(p))


@given(PATH)
@example("/a/..;")
@example("/a%3B/.%3b")
def test_what_is_normal_is_what_a_slow_reader_finds(path: str) -> None:
    try:
        found = normal_path(path.encode("latin-1") + b"?x")
    except PathError:
        assert not is_normal(path.partition("?")[0])
        return
    path = path.partition("?")[0]
    assert is_normal(path)
    assert len(found) == len(units(path))
    assert found == "".join(u if len(u) == 1 else chr(0x100 + int(u[1:], 16)) for u in units(path))


@given(PATTERN, PATH)
@example("/a*b*", "/aabbbb")
@example("/*a*a", "/aaaa")
@example("/*0", "/%40")
def test_matching_is_what_a_slow_matcher_does(text: str, path: str) -> None:
    try:
        pattern = Pattern(text)
    except ValueError:
        # Refused for what no path can match, or for a `**` that is no last segment.
        assert not is_normal(text) or "**" in text.removesuffix("/**")
        return
    try:
        normal = normal_path(path.encode("latin-1"))
    except PathError:
        return
    path = path.partition("?")[0]
    assert pattern.matches(normal) == slow(units(text), units(path))
    assert PathSet((text,)).matches(normal) == pattern.matches(normal)
    if pattern.matches(normal):
        assert Pattern(text, plain=True).matches(plain_path(normal)), (
            "plain takes in more, not less"
        )
