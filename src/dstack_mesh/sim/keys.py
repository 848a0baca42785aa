"""The application keys of a simulated guest agent: `GetKey`, `Sign`, `Verify`.

The keys are real and follow from the KMS's seed, the app-id and the path, so every instance of
an app has the same. The signatures are real too, but where dstack hashes with Keccak-256 these
hash with SHA-256 (no Keccak in the standard library): good to develop with, not to compare with
a real CVM's. Nothing here takes constant time; the keys protect nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils

from dstack_mesh.sim.arguments import CallError

if TYPE_CHECKING:
    from dstack_mesh.model import AppId
    from dstack_mesh.sim.kms import Kms

_SECP256K1_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_ED25519 = "ed25519"
_SECP256K1 = "secp256k1"
_PREHASHED = "secp256k1_prehashed"
_SIGNING_PATH = "vms"
"""`Sign` has no path of its own; its key is this one's."""


class AppKeys:
    """Keys of one app under one KMS. All methods raise `CallError` for an unknown algorithm."""

    def __init__(self, kms: Kms, app_id: AppId) -> None:
        self._kms = kms
        self._app_id = app_id

    def get_key(self, path: str, purpose: str, algorithm: str) -> tuple[bytes, list[bytes]]:
        """Return 32 bytes of key for `path`, and its signature chain: by the app, by the KMS."""
        if algorithm not in {"", _ED25519, _SECP256K1}:
            raise CallError("Unsupported algorithm")
        key = self._secret(path)
        app_key = self._secret("\0app")
        public = self._public(algorithm or _SECP256K1, key)
        claim = f"{purpose}:{public.hex()}".encode()
        origin = b"dstack-kms-issued:" + bytes.fromhex(self._app_id)
        root_key = _scalar(self._kms.secret("k256 root"))
        chain = [
            sign_recoverable(app_key, hashlib.sha256(claim).digest()),
            sign_recoverable(
                root_key,
                hashlib.sha256(origin + self._public(_SECP256K1, app_key)).digest(),
            ),
        ]
        return key, chain

    def sign(self, algorithm: str, data: bytes) -> tuple[bytes, list[bytes], bytes]:
        """Return signature, signature chain (the signature first) and public key."""
        if algorithm not in {_ED25519, _SECP256K1, _PREHASHED}:
            raise CallError("Unsupported algorithm")
        curve = _ED25519 if algorithm == _ED25519 else _SECP256K1
        key, chain = self.get_key(_SIGNING_PATH, "signing", curve)
        if algorithm == _ED25519:
            signature = ed25519.Ed25519PrivateKey.from_private_bytes(key).sign(data)
        else:
            signature = sign_recoverable(key, _digest(algorithm, data))
        return signature, [signature, *chain], self._public(curve, key)

    def verify(self, algorithm: str, data: bytes, signature: bytes, public_key: bytes) -> bool:
        """Say whether `signature` (64 bytes, or 65 with a recovery id) is `public_key`'s."""
        try:
            if algorithm == _ED25519:
                ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
            elif algorithm in {_SECP256K1, _PREHASHED}:
                digest = _digest(algorithm, data)
                if len(signature) not in {64, 65}:
                    return False
                halves = (
                    int.from_bytes(half, "big") for half in (signature[:32], signature[32:64])
                )
                ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), public_key).verify(
                    utils.encode_dss_signature(*halves),
                    digest,
                    ec.ECDSA(utils.Prehashed(hashes.SHA256())),
                )
            else:
                raise CallError("Unsupported algorithm")
        except InvalidSignature:
            return False
        except ValueError as error:
            raise CallError(f"Invalid public key: {error}") from None
        return True

    def _secret(self, path: str) -> bytes:
        return _scalar(self._kms.secret(f"app-key/{self._app_id}/{path}"))

    def _public(self, algorithm: str, key: bytes) -> bytes:
        """Return the public key: 32 bytes of Ed25519, 33 of secp256k1 (compressed)."""
        if algorithm == _ED25519:
            public = ed25519.Ed25519PrivateKey.from_private_bytes(key).public_key()
            return public.public_bytes_raw()
        return _point(int.from_bytes(key, "big")).public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        )


def sign_recoverable(key: bytes, digest: bytes) -> bytes:
    """Sign a 32-byte digest with ECDSA on secp256k1: r, s (the lower one) and the recovery id.

    The nonce follows from key and digest in the spirit of RFC 6979, so that a signature is the
    same each time, and the point behind r is at hand for the recovery id (SEC 1, 4.1.6).
    """
    d, z = int.from_bytes(key, "big"), int.from_bytes(digest, "big")
    k = int.from_bytes(_scalar(hmac.digest(key, digest, "sha256")), "big")
    point = _point(k).public_numbers()
    r = point.x % _SECP256K1_ORDER
    s = pow(k, -1, _SECP256K1_ORDER) * (z + r * d) % _SECP256K1_ORDER
    recovery = (point.y & 1) | (2 if point.x >= _SECP256K1_ORDER else 0)
    if s > _SECP256K1_ORDER // 2:
        s, recovery = _SECP256K1_ORDER - s, recovery ^ 1
    return r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes((recovery,))


def _point(scalar: int) -> ec.EllipticCurvePublicKey:
    return ec.derive_private_key(scalar, ec.SECP256K1()).public_key()


def _scalar(secret: bytes) -> bytes:
    """Bring 32 random bytes into the range of secp256k1's private keys."""
    number = int.from_bytes(secret, "big") % (_SECP256K1_ORDER - 1) + 1
    return number.to_bytes(32, "big")


def _digest(algorithm: str, data: bytes) -> bytes:
    if algorithm != _PREHASHED:
        return hashlib.sha256(data).digest()
    if len(data) != 32:
        raise CallError(f"Pre-hashed data must be 32 bytes, but received {len(data)} bytes")
    return data
