"""The status page: one HTML document with its style and script in it, and nothing from elsewhere.

Its parts are the files in `status_page`. What the document may load is said by their hashes
(CSP level 3), so that nothing that came from a peer could run in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from dstack_mesh.relay.answers import Answer

_SCRIPTS = ("format.js", "charts.js", "tables.js", "page.js")


@functools.cache
def document() -> tuple[bytes, str]:
    """Give the HTML and its Content-Security-Policy."""
    folder = files("dstack_mesh.ops") / "status_page"
    style = (folder / "page.css").read_text("utf-8")
    script = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    html = (folder / "page.html").read_text("utf-8")
    html = html.replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return html.encode("utf-8"), policy


def page() -> Answer:
    """Give the page."""
    body, policy = document()
    fields = (
        f"Content-Security-Policy: {policy}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Referrer-Policy: no-referrer\r\n"
        "Cross-Origin-Resource-Policy: same-origin\r\n"
    )
    return Answer(200, body, "text/html; charset=utf-8", fields=fields.encode("ascii"))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
