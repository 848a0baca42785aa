"""The chain rules one by one: what keeps them is someone, what breaks one is refused by number."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.identity.conftest import (
    APP_A,
    APP_B,
    Issued,
    Kms,
    app_id_extension,
    app_info_extension,
    dstack_extension,
    issue,
    new_key,
    repeat_extension,
    replace_algorithm,
    replace_public_key,
    usage_extension,
)

from dstack_mesh.identity import extension
from dstack_mesh.identity.chain import ChainRuleBroken, check_chain, verify_links
from dstack_mesh.model import PeerIdentity, Role

NOW = 1_700_000_000.0
BOTH = pytest.mark.parametrize("role", Role)


def check(issued: Issued, role: Role = Role.TARGET, root_spki: bytes | None = None) -> PeerIdentity:
    return check_chain(issued.chain, role, root_spki or issued.root_spki)


def refusal(issued: Issued, role: Role = Role.TARGET, root_spki: bytes | None = None) -> str:
    with pytest.raises(ChainRuleBroken) as broken:
        check(issued, role, root_spki)
    assert str(broken.value) == f"chain rule {broken.value.rule}: {broken.value.detail}"
    return str(broken.value)


@BOTH
def test_a_chain_that_keeps_every_rule_is_its_app(kms: Kms, role: Role) -> None:
    peer = check(kms.leaf(), role)
    assert (peer.app_id, peer.app_info) == (APP_A, None)


@BOTH
def test_usage_and_eku_may_be_absent(kms: Kms, role: Role) -> None:
    app_ca = kms.app_ca(extensions=[app_id_extension(APP_A)])
    leaf = kms.leaf(issuer=app_ca, eku=None, extensions=[app_id_extension(APP_A)])
    assert check(leaf, role).app_id == APP_A


def test_app_info_is_handed_on(kms: Kms) -> None:
    peer = check(kms.leaf(more=[app_info_extension(APP_A)]))
    assert peer.app_info is not None
    assert (peer.app_info.app_id, peer.app_info.compose_hash) == (APP_A, "01" * 32)


@pytest.mark.parametrize(
    ("leaf_year", "ca_year", "first"), [(2030, 2040, 2030), (2050, 2040, 2040)]
)
def test_the_identity_holds_until_the_first_link_expires(
    kms: Kms, leaf_year: int, ca_year: int, first: int
) -> None:
    def new_year(year: int) -> datetime.datetime:
        return datetime.datetime(year, 1, 1, tzinfo=datetime.UTC)

    app_ca = kms.app_ca(not_after=new_year(ca_year))
    leaf = kms.leaf(issuer=app_ca, not_after=new_year(leaf_year))
    assert check(leaf).not_after == new_year(first).timestamp()


# Rule 1


def test_a_root_made_again_with_the_same_key_is_the_same_root(kms: Kms) -> None:
    again = issue(
        None,
        "Dstack KMS CA",
        [x509.BasicConstraints(ca=True, path_length=1)],
        key=kms.root.key,
    )
    leaf = kms.leaf()
    assert again.cert != kms.root.cert
    assert check(replace(leaf, above=(leaf.above[0], again.cert)), root_spki=kms.root.root_spki)


def test_another_root_key_is_refused(kms: Kms) -> None:
    assert "chain rule 1: the chain ends at another root key" in refusal(
        kms.leaf(), root_spki=Kms().root.root_spki
    )


def test_only_chains_of_three_are_accepted(kms: Kms) -> None:
    leaf, root_spki = kms.leaf(), kms.root.root_spki
    middle = kms.app_ca(constraints=x509.BasicConstraints(ca=True, path_length=1))
    chains = [
        [],
        leaf.chain[:1],
        leaf.chain[:2],
        kms.leaf(issuer=kms.root).chain,
        kms.leaf(issuer=kms.app_ca(issuer=middle)).chain,
    ]
    for chain, links in zip(chains, (0, 1, 2, 2, 4), strict=True):
        with pytest.raises(ChainRuleBroken, match=f"has {links} cert") as broken:
            check_chain(chain, Role.TARGET, root_spki)
        assert broken.value.rule == 1


@pytest.mark.parametrize(("link", "rule"), [(0, 2), (1, 3), (2, 1)])
def test_a_link_that_cannot_be_parsed_is_refused(kms: Kms, link: int, rule: int) -> None:
    chain = kms.leaf().chain
    chain[link] = b"\x30\x03\x02\x01\x01"
    with pytest.raises(ChainRuleBroken, match="cannot be parsed") as broken:
        check_chain(chain, Role.TARGET, kms.root.root_spki)
    assert broken.value.rule == rule


# Rule 2


def test_a_leaf_may_say_that_it_is_not_a_ca(kms: Kms) -> None:
    assert check(kms.leaf(more=[x509.BasicConstraints(ca=False, path_length=None)]))


def test_a_leaf_that_is_a_ca_is_refused(kms: Kms) -> None:
    leaf = kms.leaf(more=[x509.BasicConstraints(ca=True, path_length=None)])
    assert refusal(leaf) == "chain rule 2: the leaf is a CA certificate"


@pytest.mark.parametrize(
    ("eku", "role", "lacking"),
    [
        (ExtendedKeyUsageOID.SERVER_AUTH, Role.CALLER, "clientAuth, which a caller needs"),
        (ExtendedKeyUsageOID.CLIENT_AUTH, Role.TARGET, "serverAuth, which a target needs"),
        (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, Role.TARGET, "serverAuth"),
        (ExtendedKeyUsageOID.CODE_SIGNING, Role.CALLER, "clientAuth"),
    ],
)
def test_an_eku_must_name_the_role(
    kms: Kms, eku: x509.ObjectIdentifier, role: Role, lacking: str
) -> None:
    message = refusal(kms.leaf(eku=[eku]), role)
    assert message.startswith("chain rule 2")
    assert lacking in message


@pytest.mark.parametrize("usage", ["app:ca", "kms:rpc", "", "APP:CUSTOM", "app:custom "])
def test_a_leaf_with_another_usage_is_refused(kms: Kms, usage: str) -> None:
    leaf = kms.leaf(extensions=[app_id_extension(APP_A), usage_extension(usage)])
    assert refusal(leaf) == f"chain rule 2: the leaf's usage is {usage!r}, expected 'app:custom'"


def test_a_leaf_without_app_id_is_refused(kms: Kms) -> None:
    assert refusal(kms.leaf(extensions=[])).startswith(
        "chain rule 2: the leaf: no app-id extension"
    )


def test_a_leaf_with_a_malformed_app_id_is_refused(kms: Kms) -> None:
    odd = x509.UnrecognizedExtension(extension.OID_APP_ID, bytes.fromhex(APP_A))
    assert "chain rule 2: the leaf: the app-id extension's value is not" in refusal(
        kms.leaf(extensions=[odd])
    )


def test_a_leaf_with_a_malformed_usage_is_refused(kms: Kms) -> None:
    odd = x509.UnrecognizedExtension(extension.OID_USAGE, b"app:custom")
    assert "chain rule 2: the leaf: the usage extension" in refusal(
        kms.leaf(extensions=[app_id_extension(APP_A), odd])
    )


@pytest.mark.parametrize("oid", [extension.OID_APP_ID, extension.OID_USAGE])
def test_a_leaf_with_a_repeated_extension_is_refused(kms: Kms, oid: x509.ObjectIdentifier) -> None:
    message = refusal(repeat_extension(kms.leaf(), oid))
    assert message.startswith("chain rule 2: the leaf: ")
    assert message.endswith("more than once")


# Rule 3


def test_an_app_ca_that_is_not_a_ca_is_refused(kms: Kms) -> None:
    for constraints in (None, x509.BasicConstraints(ca=False, path_length=None)):
        leaf = kms.leaf(issuer=kms.app_ca(constraints=constraints))
        assert refusal(leaf) == "chain rule 3: the app CA is not a CA certificate"


@pytest.mark.parametrize("path_length", [None, 1])
def test_an_app_ca_with_another_path_length_is_refused(kms: Kms, path_length: int | None) -> None:
    app_ca = kms.app_ca(constraints=x509.BasicConstraints(ca=True, path_length=path_length))
    assert refusal(kms.leaf(issuer=app_ca)) == (
        f"chain rule 3: the app CA's path length is {path_length}, expected 0"
    )


def test_an_app_ca_with_another_usage_is_refused(kms: Kms) -> None:
    app_ca = kms.app_ca(extensions=[app_id_extension(APP_A), usage_extension("app:custom")])
    assert refusal(kms.leaf(issuer=app_ca)) == (
        "chain rule 3: the app CA's usage is 'app:custom', expected 'app:ca'"
    )


def test_an_app_ca_cannot_vouch_for_another_app(kms: Kms) -> None:
    message = refusal(kms.leaf(APP_B, issuer=kms.app_ca(APP_A)))
    assert message == (
        f"chain rule 3: the leaf says app-id {APP_B}, but the app CA that signed it {APP_A}"
    )


def test_an_app_ca_without_app_id_is_refused(kms: Kms) -> None:
    app_ca = kms.app_ca(extensions=[usage_extension("app:ca")])
    assert refusal(kms.leaf(issuer=app_ca)).startswith("chain rule 3: the app CA: no app-id")


def test_an_app_ca_with_two_app_ids_is_refused(kms: Kms) -> None:
    app_ca = repeat_extension(kms.app_ca(), extension.OID_APP_ID)
    message = refusal(kms.leaf(issuer=app_ca))
    assert message.startswith("chain rule 3: the app CA: the app-id extension")


# Rule 4


def test_app_info_of_another_app_is_refused(kms: Kms) -> None:
    assert refusal(kms.leaf(more=[app_info_extension(APP_B)])) == (
        f"chain rule 4: the leaf says app-id {APP_A}, but its app info {APP_B}"
    )


def test_app_info_that_does_not_decode_is_refused(kms: Kms) -> None:
    broken = dstack_extension(extension.OID_APP_INFO, b"\xc1")
    assert refusal(kms.leaf(more=[broken])).startswith("chain rule 4: the leaf: the app info")


# Rule 5


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(ed25519.Ed25519PrivateKey.generate(), id="ed25519"),
        pytest.param(ed448.Ed448PrivateKey.generate(), id="ed448"),
        pytest.param(ec.generate_private_key(ec.SECP384R1()), id="P-384"),
        pytest.param(rsa.generate_private_key(65537, 2048), id="RSA-2048"),
    ],
)
def test_other_strong_keys_are_accepted_at_every_link(key: object) -> None:
    constraints = [x509.BasicConstraints(ca=True, path_length=1)]
    kms = Kms(issue(None, "Dstack KMS CA", constraints, key=key))
    assert check(kms.leaf(issuer=kms.app_ca(key=key), key=key))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        pytest.param(rsa.generate_private_key(65537, 1024), "RSAPublicKey, 1024", id="RSA-1024"),
        pytest.param(ec.generate_private_key(ec.SECP192R1()), "192 bits", id="P-192"),
        pytest.param(dsa.generate_private_key(2048), "DSAPublicKey, 2048", id="DSA"),
    ],
)
@pytest.mark.parametrize("link", ["leaf", "app CA", "root"])
def test_weak_keys_are_refused_at_every_link(key: object, words: str, link: str) -> None:
    weak = {"key": key}
    constraints = [x509.BasicConstraints(ca=True, path_length=1)]
    kms = Kms(issue(None, "Dstack KMS CA", constraints, **(weak if link == "root" else {})))
    app_ca = kms.app_ca(**(weak if link == "app CA" else {}))
    message = refusal(kms.leaf(issuer=app_ca, **(weak if link == "leaf" else {})))
    assert message.startswith(f"chain rule 5: the {link}'s key (")
    assert words in message


def test_sha1_is_refused_below_the_root(kms: Kms) -> None:
    # cryptography refuses to sign with SHA-1, so only the algorithm's name is put in afterwards.
    for link, leaf in (
        ("leaf", replace_algorithm(kms.leaf(), "2a8648ce3d0401")),
        ("app CA", kms.leaf(issuer=replace_algorithm(kms.app_ca(), "2a8648ce3d0401"))),
    ):
        assert refusal(leaf) == (
            f"chain rule 5: the {link} is signed with sha1, below security level 2"
        )


def test_the_roots_own_signature_proves_nothing_and_is_not_looked_at(kms: Kms) -> None:
    leaf = kms.leaf()
    root = replace_algorithm(kms.root, "2a8648ce3d0401").cert
    assert check(replace(leaf, above=(leaf.above[0], root)))


def test_an_unknown_signature_algorithm_is_refused(kms: Kms) -> None:
    assert refusal(replace_algorithm(kms.leaf(), "2a8648ce3d047f")).startswith(
        "chain rule 5: the leaf's signature algorithm"
    )


def test_a_public_key_that_cannot_be_read_is_refused(kms: Kms) -> None:
    assert refusal(replace_public_key(kms.leaf(), "2a8648ce3d027f")).startswith(
        "chain rule 5: the leaf's public key cannot be read"
    )


# Signatures and dates, where no handshake has looked at them


def test_links_that_fit_are_verified(kms: Kms) -> None:
    verify_links(kms.leaf().chain, NOW)


def test_a_signature_of_another_key_is_refused(kms: Kms) -> None:
    leaf, other = kms.leaf(), kms.app_ca()
    with pytest.raises(ChainRuleBroken, match="leaf is not signed by the next link") as broken:
        verify_links(replace(leaf, above=(other.cert, kms.root.cert)).chain, NOW)
    assert broken.value.rule == 1


def test_an_issuer_of_another_name_is_refused(kms: Kms) -> None:
    leaf = kms.leaf()
    with pytest.raises(ChainRuleBroken, match="app CA is not signed by the next link"):
        verify_links(replace(leaf, above=(leaf.above[0], kms.leaf().cert)).chain, NOW)


@pytest.mark.parametrize(
    ("before", "after", "fits"), [(-1, 1, True), (-2, 0, False), (1, 2, False)]
)
@pytest.mark.parametrize("link", ["leaf", "app CA"])
def test_dates_of_every_link_are_held_against_the_clock(
    kms: Kms, before: int, after: int, fits: bool, link: str
) -> None:
    now = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    dates = {
        "not_before": now + datetime.timedelta(days=before),
        "not_after": now + datetime.timedelta(days=after),
    }
    app_ca = kms.app_ca(**(dates if link == "app CA" else {}))
    chain = kms.leaf(issuer=app_ca, **(dates if link == "leaf" else {})).chain
    if fits:
        verify_links(chain, NOW)
        return
    with pytest.raises(ChainRuleBroken, match=f"the {link} is valid from 2023-.* now it is 2023-"):
        verify_links(chain, NOW)


def test_the_key_of_a_link_plays_no_part_in_who_it_is(kms: Kms) -> None:
    assert check(kms.leaf(key=new_key())) == check(kms.leaf(key=new_key()))
