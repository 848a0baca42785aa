"""What a leaf alone can tell of its holder, for nginx mode: nginx hands on no more of the chain.

nginx has verified signatures, dates and path lengths up to the KMS root, and that somebody holds
the key. What is left of the chain rules for `identify_leaf` is all that is written in the leaf
itself. That its app CA carries the same app-id (rule 3) cannot be seen from here: who holds the
CA key of one app can pose as another app behind nginx. The embedded terminator checks it.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import NameOID

from dstack_mesh.identity.chain import (
    LEAF,
    ChainRuleBroken,
    check_app_info,
    check_dates,
    check_leaf,
    check_strength,
    load,
)
from dstack_mesh.model import PeerIdentity, Role

APP_CA_NAME = x509.Name(
    [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Dstack"),
        x509.NameAttribute(NameOID.COMMON_NAME, "Dstack App CA"),
    ]
)
"""The name of every app CA: by it a leaf is told from one that the root itself has signed."""

_SHOWN_CHARACTERS = 100


def identify_leaf(der: bytes, role: Role, at: float) -> PeerIdentity:
    """Return who holds this leaf, or raise `ChainRuleBroken`.

    `at` is the time now, in seconds since 1970. The leaf is believed because somebody who was
    asked to has verified its signature; here it is not looked at.
    """
    leaf = load(LEAF, der)
    check_strength(LEAF, leaf)
    _check_issuer(leaf)
    check_dates(LEAF, leaf, at)
    app_id = check_leaf(leaf, role)
    app_info = check_app_info(leaf, app_id)
    return PeerIdentity(app_id, leaf.not_valid_after_utc.timestamp(), app_info)


def _check_issuer(leaf: x509.Certificate) -> None:
    """Rule 1, as far as it can be seen: an app CA stands between the leaf and the root."""
    try:
        issuer = leaf.issuer
    except Exception as exc:  # what cannot be parsed is refused, whatever the parser raises
        raise ChainRuleBroken(1, f"the leaf's issuer cannot be read: {exc}") from exc
    if issuer != APP_CA_NAME:
        shown = ascii(issuer.rfc4514_string()[:_SHOWN_CHARACTERS])
        raise ChainRuleBroken(
            1, f"the leaf's issuer is {shown}, expected {APP_CA_NAME.rfc4514_string()!r}"
        )
