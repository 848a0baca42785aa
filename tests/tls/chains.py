"""Chains of every shape, and who could make them: good ones with more around, and nobody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from dstack_mesh.model import AppId
from dstack_mesh.sim import certificates as certs
from dstack_mesh.sim.certificates import Extension, Issued
from dstack_mesh.sim.kms import APP_CA_NAME, ROOT_NAME, Kms
from tests.tls import der as by_hand
from tests.tls.scene import OTHER

_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Mint:
    """Whoever could make a chain that should be `app_id`: the KMS, a CA's holder, a stranger."""

    kms: Kms
    app_id: AppId

    def leaf_extensions(self, *more: Extension) -> list[Extension]:
        usual = certs.leaf_extensions((), server_auth=True, client_auth=True)
        own = [certs.app_id_extension(self.app_id), certs.usage_extension("app:custom")]
        return [*usual, *own, *more]

    def ca_extensions(self, key: _Key, app_id: AppId, length: int | None) -> list[Extension]:
        own = [certs.app_id_extension(app_id), certs.usage_extension("app:ca")]
        return [*certs.ca_extensions(key, length), *own]

    def good(self, *more: Extension, key: _Key | None = None) -> Issued:
        ca_key, ca = self.kms.app_ca(self.app_id)
        above = (ca, self.kms.root)
        return self.kms.sign_leaf(APP_CA_NAME, ca_key, self.leaf_extensions(*more), above, key=key)

    def ca(
        self,
        key: _Key,
        issuer_key: _Key,
        *,
        issuer: x509.Name = ROOT_NAME,
        app_id: AppId | None = None,
        length: int | None = 0,
        subject: x509.Name = APP_CA_NAME,
    ) -> x509.Certificate:
        extensions = self.ca_extensions(key, app_id or self.app_id, length)
        return certs.build(
            subject, issuer, key, issuer_key, extensions, not_after=certs.in_ten_years()
        )

    def under(self, key: _Key, *above: x509.Certificate, issuer: x509.Name = APP_CA_NAME) -> Issued:
        return self.kms.sign_leaf(issuer, key, self.leaf_extensions(), above)


def with_chain(issued: Issued, *chain: bytes | x509.Certificate) -> Issued:
    """The same leaf and key, with these certificates behind it."""
    pems = [one if isinstance(one, bytes) else certs.certificate_pem(one) for one in chain]
    return Issued(issued.key_pem, (issued.leaf_pem, *pems))


# Good leaves with more or less around them: they are who they are.


def no_root(mint: Mint) -> Issued:
    return with_chain(good := mint.good(), good.chain_pem[1])


def leaf_twice(mint: Mint) -> Issued:
    return with_chain(good := mint.good(), *good.chain_pem)


def app_ca_twice(mint: Mint) -> Issued:
    good = mint.good()
    return with_chain(good, good.chain_pem[1], *good.chain_pem[1:])


def root_many_times(mint: Mint) -> Issued:
    good = mint.good()
    return with_chain(good, good.chain_pem[1], *[good.chain_pem[2]] * 50)


def out_of_order(mint: Mint) -> Issued:
    return with_chain(good := mint.good(), good.chain_pem[2], good.chain_pem[1])


def behind_strangers(mint: Mint) -> Issued:
    strangers = [self_signed(new_key(), f"stranger {number}") for number in range(20)]
    return with_chain(good := mint.good(), *strangers, *good.chain_pem[1:])


def with_a_hundred(mint: Mint) -> Issued:
    """Some 60 KB."""
    stranger = self_signed(new_key(), "stranger")
    return with_chain(good := mint.good(), *good.chain_pem[1:], *[stranger] * 140)


def with_other_apps_ca_behind(mint: Mint) -> Issued:
    """All app CAs have one name; the right one comes first."""
    good = mint.good()
    return with_chain(good, *good.chain_pem[1:], mint.kms.app_ca(OTHER)[1])


def with_a_loop_behind(mint: Mint) -> Issued:
    good = mint.good()
    return with_chain(good, *good.chain_pem[1:], *loop("one", "other"))


def with_the_other_root(mint: Mint) -> Issued:
    """A root with our root's name and another key, behind the right chain."""
    good = mint.good()
    return with_chain(good, *good.chain_pem[1:], Kms.create().root)


def renewed_root(mint: Mint) -> Issued:
    """The KMS made its root certificate again, with the same key."""
    good = mint.good()
    again = Kms.__new__(Kms)
    again.__dict__.update(mint.kms.__dict__)
    again.remake_root()
    return with_chain(good, good.chain_pem[1], again.root)


def large_extension(mint: Mint) -> Issued:
    """A quote in it, say: 50 KB."""
    return mint.good(certs.custom(certs.OID_ATTESTATION, bytes(50_000)))


def many_extensions(mint: Mint) -> Issued:
    more = [
        (
            x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.99999.{n}"), b"\5\0"),
            False,
        )
        for n in range(1000)
    ]
    return mint.good(*more)


@cache
def huge_rsa() -> rsa.RSAPrivateKey:
    """15,636 bits from two Mersenne primes, as making one of that size takes minutes."""
    return rsa_of(11_213, 4_423)


def rsa_of(one: int, other: int) -> rsa.RSAPrivateKey:
    p, q, e = 2**one - 1, 2**other - 1, 65_537
    d = pow(e, -1, (p - 1) * (q - 1))
    public = rsa.RSAPublicNumbers(e, p * q)
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public)
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


def huge_key(mint: Mint) -> Issued:
    return mint.good(key=huge_rsa())


def cross_signed(mint: Mint) -> Issued:
    """The app CA once from a stranger's root and once from ours, ours first."""
    stranger = Kms.create()
    ca_key, ca = mint.kms.app_ca(mint.app_id)
    foreign = mint.ca(ca_key, stranger.root_key)
    return mint.under(ca_key, ca, foreign, stranger.root, mint.kms.root)


GOOD: dict[str, Callable[[Mint], Issued]] = {
    one.__name__: one
    for one in (
        no_root,
        leaf_twice,
        app_ca_twice,
        root_many_times,
        out_of_order,
        behind_strangers,
        with_a_hundred,
        with_other_apps_ca_behind,
        with_a_loop_behind,
        with_the_other_root,
        renewed_root,
        large_extension,
        many_extensions,
        huge_key,
        cross_signed,
    )
}


# Chains that are nobody.


def self_signed(key: _Key, name: str) -> x509.Certificate:
    subject = certs.leaf_name(name)
    extensions = certs.ca_extensions(key, None)
    return certs.build(subject, subject, key, key, extensions, not_after=certs.in_ten_years())


def loop(*names: str) -> list[x509.Certificate]:
    """CAs in a ring, each signed by the next and the last by the first."""
    keys = [new_key() for _ in names]
    found = []
    for number, name in enumerate(names):
        issuer = (number + 1) % len(names)
        found.append(
            certs.build(
                certs.ca_name(name),
                certs.ca_name(names[issuer]),
                keys[number],
                keys[issuer],
                certs.ca_extensions(keys[number], None),
                not_after=certs.in_ten_years(),
            )
        )
    return found


def of_length(links: int) -> Callable[[Mint], Issued]:
    """So many CAs between the leaf and our root, each signed by the next: all signatures good.

    The KMS itself would have to make the topmost of them, without its path length.
    """

    def make(mint: Mint) -> Issued:
        keys = [new_key() for _ in range(links)]
        names = [certs.ca_name(f"link {number}") for number in range(links)]
        cas = [
            mint.ca(
                keys[number],
                keys[number + 1] if number + 1 < links else mint.kms.root_key,
                issuer=names[number + 1] if number + 1 < links else ROOT_NAME,
                subject=names[number],
                length=None,
            )
            for number in range(links)
        ]
        return mint.under(keys[0], *cas, mint.kms.root, issuer=names[0])

    return make


def looping(mint: Mint) -> Issued:
    """Our leaf's issuer and another sign each other, and no root is in sight."""
    keys = [new_key(), new_key()]
    names = [APP_CA_NAME, certs.ca_name("Dstack App CA 2")]
    ring = [
        mint.ca(keys[one], keys[other], issuer=names[other], subject=names[one], length=None)
        for one, other in ((0, 1), (1, 0))
    ]
    return mint.under(keys[0], *ring * 10)


def issuer_is_itself(mint: Mint) -> Issued:
    """An app CA that signed itself, with the right name and app-id."""
    key = new_key()
    return mint.under(key, mint.ca(key, key, issuer=APP_CA_NAME), mint.kms.root)


def leaf_signed_itself(mint: Mint) -> Issued:
    key = new_key()
    chain = (mint.kms.app_ca(mint.app_id)[1], mint.kms.root)
    name = certs.leaf_name("localhost")
    return mint.kms.sign_leaf(name, key, mint.leaf_extensions(), chain, key=key)


def leaf_named_as_root(mint: Mint) -> Issued:
    """Self-signed, in our root's name, with all that a leaf has."""
    key = new_key()
    leaf = certs.build(
        ROOT_NAME, ROOT_NAME, key, key, mint.leaf_extensions(), not_after=certs.in_ten_years()
    )
    return Issued(certs.key_pem(key), (certs.certificate_pem(leaf), mint.kms.root_pem))


def leaf_by_the_root(mint: Mint) -> Issued:
    ca = mint.kms.app_ca(mint.app_id)[1]
    kms = mint.kms
    return kms.sign_leaf(ROOT_NAME, kms.root_key, mint.leaf_extensions(), (ca, kms.root))


def no_app_ca(mint: Mint) -> Issued:
    return with_chain(good := mint.good(), good.chain_pem[2])


def leaf_alone(mint: Mint) -> Issued:
    return with_chain(mint.good())


def other_apps_ca_first(mint: Mint) -> Issued:
    """All app CAs have one name: OpenSSL takes the first, whose signature it is not."""
    good = mint.good()
    return with_chain(good, mint.kms.app_ca(OTHER)[1], *good.chain_pem[1:])


def only_other_apps_ca(mint: Mint) -> Issued:
    return with_chain(mint.good(), mint.kms.app_ca(OTHER)[1], mint.kms.root)


def signed_by_other_apps_ca(mint: Mint) -> Issued:
    """The other app's CA signed it; the right app's CA is shown as well, first and last."""
    own = mint.kms.app_ca(mint.app_id)[1]
    key, ca = mint.kms.app_ca(OTHER)
    return mint.under(key, ca, own, mint.kms.root)


def other_apps_ca_with_our_app_id(mint: Mint) -> Issued:
    """The holder of the other app's CA makes a certificate for itself that says it is ours."""
    key, ca = mint.kms.app_ca(OTHER)
    own = new_key()
    forged = mint.ca(own, key, issuer=APP_CA_NAME)
    return mint.under(own, forged, ca, mint.kms.root)


def ca_of_strangers_root(mint: Mint) -> Issued:
    """A stranger's KMS throughout, with our root shown behind it."""
    stranger = Kms.create()
    key, ca = stranger.app_ca(mint.app_id)
    return mint.under(key, ca, stranger.root, mint.kms.root)


def cross_signed_wrongly(mint: Mint) -> Issued:
    """The app CA's own key, but certified by the stranger's root only."""
    stranger = Kms.create()
    key, _ = mint.kms.app_ca(mint.app_id)
    return mint.under(key, mint.ca(key, stranger.root_key), stranger.root)


def root_signed_by_stranger(mint: Mint) -> Issued:
    """Our root's key, certified by a stranger; the app CA is not there."""
    stranger = Kms.create()
    cross = certs.build(
        ROOT_NAME,
        stranger.root.subject,
        mint.kms.root_key,
        stranger.root_key,
        certs.ca_extensions(mint.kms.root_key, 1),
        not_after=certs.in_ten_years(),
    )
    return with_chain(mint.good(), cross, stranger.root)


def leaf_of_a_leaf(mint: Mint) -> Issued:
    good = mint.good()
    key = serialization.load_pem_private_key(good.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    above = [x509.load_pem_x509_certificate(pem) for pem in good.chain_pem]
    return mint.under(key, *above, issuer=certs.leaf_name("localhost"))


def too_large(mint: Mint) -> Issued:
    """Over 100 KB in one certificate."""
    return mint.good(certs.custom(certs.OID_ATTESTATION, bytes(110_000)))


def too_many(mint: Mint) -> Issued:
    """400 strangers, over 100 KB together."""
    stranger = self_signed(new_key(), "stranger")
    return with_chain(good := mint.good(), *good.chain_pem[1:], *[stranger] * 400)


def too_huge_key_of_ca(mint: Mint) -> Issued:
    """An app CA of 20,902 bits, over what OpenSSL calculates with (CVE-2006-2940's kind)."""
    key = rsa_of(11_213, 9_689)
    return mint.under(key, mint.ca(key, mint.kms.root_key), mint.kms.root)


def unknown_critical_extension(mint: Mint) -> Issued:
    oid = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
    return mint.good((x509.UnrecognizedExtension(oid, b"\5\0"), True))


def name_constraints_that_forbid(mint: Mint) -> Issued:
    key = new_key()
    forbid = x509.NameConstraints(None, [x509.DNSName("localhost"), x509.DNSName("")])
    extensions = [*mint.ca_extensions(key, mint.app_id, 0), (forbid, True)]
    ca = certs.build(
        APP_CA_NAME, ROOT_NAME, key, mint.kms.root_key, extensions, not_after=certs.in_ten_years()
    )
    alt = (x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    above = (ca, mint.kms.root)
    return mint.kms.sign_leaf(APP_CA_NAME, key, mint.leaf_extensions(alt), above)


BAD: dict[str, Callable[[Mint], Issued]] = {
    "10 links": of_length(10),
    "2 links": of_length(2),
    "50 links": of_length(50),
    "120 links": of_length(120),
    "200 links": of_length(200),
    **{
        one.__name__: one
        for one in (
            looping,
            issuer_is_itself,
            leaf_signed_itself,
            leaf_named_as_root,
            leaf_by_the_root,
            no_app_ca,
            leaf_alone,
            other_apps_ca_first,
            only_other_apps_ca,
            signed_by_other_apps_ca,
            other_apps_ca_with_our_app_id,
            ca_of_strangers_root,
            cross_signed_wrongly,
            root_signed_by_stranger,
            leaf_of_a_leaf,
            too_large,
            too_many,
            too_huge_key_of_ca,
            unknown_critical_extension,
            name_constraints_that_forbid,
        )
    },
}


def by_sha_1(mint: Mint, link: str) -> Issued:
    """The app CA signed the leaf with SHA-1, or the KMS the app CA; the signature is good."""
    good = mint.good()
    at = {"leaf": 0, "app CA": 1}[link]
    signer = mint.kms.app_ca(mint.app_id)[0] if link == "leaf" else mint.kms.root_key
    cert = x509.load_pem_x509_certificate(good.chain_pem[at])
    tbs = by_hand.with_algorithm(cert.tbs_certificate_bytes, by_hand.ECDSA_SHA_1)
    weak = x509.load_der_x509_certificate(by_hand.sign(tbs, signer, hashes.SHA1()))
    pems = list(good.chain_pem)
    pems[at] = certs.certificate_pem(weak)
    return Issued(good.key_pem, tuple(pems))
