from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from dstack_mesh.ops.page import document, page


class Reader(HTMLParser):
    """Notes elements, their attributes, and what is in style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"style": [], "script": []}
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open].append(data)


def read() -> Reader:
    reader = Reader()
    reader.feed(document()[0].decode())
    return reader


def policy() -> dict[str, list[str]]:
    return {part.split()[0]: part.split()[1:] for part in document()[1].split(";")}


def test_nothing_comes_from_elsewhere() -> None:
    for tag, attributes in read().elements:
        for name in ("src", "href", "action", "srcset", "data"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "/", "data:")), (tag, value)
            assert not value.startswith("//")
        assert tag not in {"iframe", "object", "embed", "form", "base"}
    text = document()[0].decode()
    assert "@import" not in text
    assert "url(" not in text


def test_there_is_no_script_or_style_in_attributes() -> None:
    for tag, attributes in read().elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag


def test_nothing_is_made_from_markup() -> None:
    script = "".join(read().inside["script"])
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_the_policy_allows_this_script_and_style_alone() -> None:
    allowed = policy()
    assert allowed["default-src"] == ["'none'"]
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        digest = hashlib.sha256("".join(read().inside[tag]).encode()).digest()
        assert allowed[directive] == [f"'sha256-{base64.b64encode(digest).decode()}'"]
    assert allowed["connect-src"] == ["'self'"]
    for directive in ("base-uri", "form-action", "frame-ancestors"):
        assert allowed[directive] == ["'none'"]


def test_the_answer() -> None:
    answer = page()
    assert answer.status == 200
    assert b"Content-Type: text/html; charset=utf-8\r\n" in answer.fields
    assert f"Content-Security-Policy: {document()[1]}\r\n".encode() in answer.fields
    assert b"Cache-Control: no-store\r\n" in answer.fields
    assert len(answer.body) < 60_000


def test_landmarks_headings_and_tables_have_names() -> None:
    elements = read().elements
    tags = [tag for tag, _ in elements]
    assert tags.count("main") == tags.count("header") == tags.count("footer") == 1
    assert tags.count("h1") == 1
    ids = {attributes.get("id") for _, attributes in elements}
    for tag, attributes in elements:
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        if tag == "th":
            assert attributes["scope"] == "col"
    assert any(attributes.get("aria-live") == "polite" for _, attributes in elements)
