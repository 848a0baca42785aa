"""Application keys: the same each time, and signatures that somebody else's code verifies."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils

from dstack_mesh.model import AppId
from dstack_mesh.sim.arguments import CallError
from dstack_mesh.sim.keys import AppKeys, sign_recoverable
from dstack_mesh.sim.kms import Kms

APP = AppId("aa" * 20)
KEYS = AppKeys(Kms.create(b"keys"), APP)


def test_key_follows_from_kms_app_and_path() -> None:
    key, chain = KEYS.get_key("a/b", "test", "")
    assert len(key) == 32
    assert [len(link) for link in chain] == [65, 65]
    assert KEYS.get_key("a/b", "other", "secp256k1")[0] == key
    assert KEYS.get_key("a/c", "test", "")[0] != key
    assert AppKeys(Kms.create(b"keys"), AppId("bb" * 20)).get_key("a/b", "test", "")[0] != key
    assert AppKeys(Kms.create(b"keys"), APP).get_key("a/b", "test", "") == (key, chain)


@pytest.mark.parametrize("algorithm", ["ed25519", "secp256k1"])
def test_signature_verifies_and_a_changed_one_does_not(algorithm: str) -> None:
    signature, chain, public_key = KEYS.sign(algorithm, b"hello")
    assert chain[0] == signature
    assert len(chain) == 3
    assert KEYS.verify(algorithm, b"hello", signature, public_key)
    assert not KEYS.verify(algorithm, b"hullo", signature, public_key)


def test_ed25519_is_what_the_library_verifies() -> None:
    signature, _, public_key = KEYS.sign("ed25519", b"hello")
    ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, b"hello")


def test_prehashed_is_the_hash_of_the_plain_one() -> None:
    plain = KEYS.sign("secp256k1", b"hello")[0]
    digest = hashlib.sha256(b"hello").digest()
    assert KEYS.sign("secp256k1_prehashed", digest)[0] == plain
    with pytest.raises(CallError, match="32 bytes"):
        KEYS.sign("secp256k1_prehashed", b"short")


def test_recovery_id_leads_to_the_key() -> None:
    for number in range(1, 20):
        key = number.to_bytes(32, "big")
        digest = hashlib.sha256(key).digest()
        signature = sign_recoverable(key, digest)
        public = ec.derive_private_key(number, ec.SECP256K1()).public_key()
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
        public.verify(
            utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        )
        assert s <= ORDER // 2
        assert recover(digest, r, s, signature[64]) == public.public_numbers()


ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
FIELD = 2**256 - 2**32 - 977


def recover(digest: bytes, r: int, s: int, recovery: int) -> ec.EllipticCurvePublicNumbers:
    """SEC 1, 4.1.6, with plain affine arithmetic."""
    encoded = bytes((2 + (recovery & 1),)) + (r + ORDER * (recovery >> 1)).to_bytes(32, "big")
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), encoded)
    big_r = (point.public_numbers().x, point.public_numbers().y)
    base = ec.derive_private_key(1, ec.SECP256K1()).public_key().public_numbers()
    inverse = pow(r, -1, ORDER)
    z = int.from_bytes(digest, "big")
    x, y = add(
        multiply(big_r, s * inverse % ORDER), multiply((base.x, base.y), -z * inverse % ORDER)
    )
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256K1())


Point = tuple[int, int]


def add(one: Point, other: Point) -> Point:
    if one == other:
        slope = 3 * one[0] * one[0] * pow(2 * one[1], -1, FIELD)
    else:
        slope = (other[1] - one[1]) * pow(other[0] - one[0], -1, FIELD)
    x = (slope * slope - one[0] - other[0]) % FIELD
    return x, (slope * (one[0] - x) - one[1]) % FIELD


def multiply(point: Point, scalar: int) -> Point:
    found: Point | None = None
    while scalar:
        if scalar & 1:
            found = point if found is None else add(found, point)
        point, scalar = add(point, point), scalar >> 1
    assert found is not None
    return found


@pytest.mark.parametrize("algorithm", ["", "rsa"])
def test_unknown_algorithm(algorithm: str) -> None:
    with pytest.raises(CallError, match="Unsupported algorithm"):
        KEYS.sign(algorithm, b"")
    with pytest.raises(CallError, match="Unsupported algorithm"):
        KEYS.verify(algorithm, b"", b"", b"")
    with pytest.raises(CallError, match="Unsupported algorithm"):
        KEYS.get_key("", "", "rsa")


def test_unusable_signature_or_key() -> None:
    public = ec.derive_private_key(1, ec.SECP256K1()).public_key()
    encoded = public.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )
    assert not KEYS.verify("secp256k1", b"x", b"short", encoded)
    with pytest.raises(CallError, match="Invalid public key"):
        KEYS.verify("ed25519", b"x", bytes(64), b"short")
