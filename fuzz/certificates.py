"""What mutations begin with: the certificates of the test vectors, made by dstack's own code."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "tests" / "vectors" / "certs"
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----")

# The first is the plainest; the order is part of the corpus' meaning.
BASES = (
    "leaf-a",
    "leaf-b",
    "leaf-a-appinfo",
    "leaf-b-under-a-ca",
    "leaf-a-foreign-kms",
    "leaf-noappid",
    "leaf-a-expired",
    "leaf-a-notyet",
    "leaf-a-serveronly",
    "leaf-a-clientonly",
    "leaf-a-noeku",
    "leaf-a-san",
    "odd-appid-raw",
    "odd-appid-32",
    "odd-appid-utf8",
    "odd-appid-empty",
    "odd-appid-trailing",
    "leaf-fixture-appinfo",
)


@cache
def chain(name: str) -> tuple[bytes, ...]:
    """Give a vector's chain as DER, the leaf first."""
    pem = (_FOLDER / f"{name}.chain.pem").read_bytes()
    return tuple(base64.b64decode(body) for body in _PEM.findall(pem))


@cache
def app_id(name: str) -> str | None:
    """Give the app-id that dstack's own code reads in a vector."""
    vectors = json.loads((_FOLDER / "index.json").read_text())["vectors"]
    found: str | None = next(one["app_id"] for one in vectors if one["name"] == name)
    return found
