"""Both ends of TLS 1.2 by hand (RFC 5246, RFC 5289): ECDHE on X25519, ECDSA, AES-128-GCM.

For what only 1.2 has: renegotiation, and handshake messages in the clear.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.tls import records as tls
from tests.tls.records import Channel, Hello, Reader
from tests.tls.tls13 import AlertReceived, Ended, Shown

_NAMED_CURVE = 3
SCSV = 0x00FF
"""Says that secure renegotiation is known (RFC 5746 3.3)."""


def prf(secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    """RFC 5246 5."""
    seed = label + seed
    turn, found = seed, b""
    while len(found) < size:
        turn = hmac.digest(secret, turn, "sha256")
        found += hmac.digest(secret, turn + seed, "sha256")
    return found[:size]


class Protection:
    """One direction (RFC 5288 3)."""

    def __init__(self, key: bytes, salt: bytes) -> None:
        self._aead, self._salt, self._sequence = AESGCM(key), salt, 0

    def seal(self, kind: int, content: bytes) -> bytes:
        explicit = self._sequence.to_bytes(8)
        sealed = self._aead.encrypt(self._salt + explicit, content, self._extra(kind, content))
        return tls.record(kind, explicit + sealed)

    def open(self, kind: int, sealed: bytes) -> bytes:
        plain_size = bytes(len(sealed) - 24)
        extra = self._extra(kind, plain_size)
        return self._aead.decrypt(self._salt + sealed[:8], sealed[8:], extra)

    def _extra(self, kind: int, content: bytes) -> bytes:
        extra = self._sequence.to_bytes(8) + bytes([kind, 3, 3]) + len(content).to_bytes(2)
        self._sequence += 1
        return extra


class Peer:
    """What both ends share."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.transcript = b""
        self.client_random, self.server_random = b"", b""
        self.sending: Protection | None = None
        self.receiving: Protection | None = None
        self.application_data = b""
        self._next_receiving: Protection | None = None
        self._next_sending: Protection | None = None
        self._master = b""
        self._key = X25519PrivateKey.generate()
        self._raw = b""
        self._messages = b""

    @property
    def share(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def send(self, kind: int, content: bytes) -> None:
        if self.sending is None:
            self.channel.send(tls.in_records(kind, content))
        else:
            self.channel.send(self.sending.seal(kind, content))

    def say(self, *messages: bytes) -> None:
        content = b"".join(messages)
        self.transcript += content
        self.send(tls.HANDSHAKE, content)

    def read_record(self) -> tuple[int, bytes]:
        while len(self._raw) < 5 or len(self._raw) < 5 + int.from_bytes(self._raw[3:5]):
            piece = self.channel.receive()
            if not piece:
                raise Ended
            self._raw += piece
        end = 5 + int.from_bytes(self._raw[3:5])
        kind, content, self._raw = self._raw[0], self._raw[5:end], self._raw[end:]
        if self.receiving is not None:
            content = self.receiving.open(kind, content)
        if kind == tls.CHANGE_CIPHER_SPEC:
            self.receiving = self._next_receiving
        elif kind == tls.ALERT:
            raise AlertReceived(content[1])
        elif kind == tls.APPLICATION_DATA:
            self.application_data += content
        return kind, content

    def read_message(self) -> tuple[int, bytes]:
        while len(self._messages) < 4 or len(self._messages) < 4 + self._size():
            kind, content = self.read_record()
            if kind == tls.HANDSHAKE:
                self._messages += content
        end = 4 + self._size()
        whole, self._messages = self._messages[:end], self._messages[end:]
        self.transcript += whole
        return whole[0], whole[4:]

    def _size(self) -> int:
        return int.from_bytes(self._messages[1:4])

    def change_cipher_spec(self) -> None:
        self.send(tls.CHANGE_CIPHER_SPEC, b"\1")
        self.sending = self._next_sending

    def finished(self, label: bytes) -> bytes:
        covered = hashlib.sha256(self.transcript).digest()
        return tls.message(tls.FINISHED, prf(self._master, label, covered, 12))

    def _agree(self, other_share: bytes, *, client: bool) -> None:
        shared = self._key.exchange(X25519PublicKey.from_public_bytes(other_share))
        randoms = self.client_random + self.server_random
        self._master = prf(shared, b"master secret", randoms, 48)
        block = Reader(prf(self._master, b"key expansion", randoms[32:] + randoms[:32], 40))
        client_key, server_key, client_salt, server_salt = (
            block.take(size) for size in (16, 16, 4, 4)
        )
        ends = [Protection(client_key, client_salt), Protection(server_key, server_salt)]
        self._next_sending, self._next_receiving = ends if client else reversed(ends)


class Client(Peer):
    """A caller."""

    def hello(self, *more: bytes) -> Hello:
        hello = Hello(suites=(tls.ECDHE_ECDSA_AES_128_GCM_SHA256, SCSV))
        hello.extensions = [*tls.usual_extensions(versions=(tls.TLS_1_2,)), *more]
        self.client_random = hello.random
        self.say(hello.message())
        return hello

    def read_flight(self) -> dict[int, bytes]:
        """Read the server's messages up to its ServerHelloDone; give them by kind."""
        found: dict[int, bytes] = {}
        while tls.SERVER_HELLO_DONE not in found:
            kind, body = self.read_message()
            found[kind] = body
        self.server_random = found[tls.SERVER_HELLO][2:34]
        reader = Reader(found[tls.SERVER_KEY_EXCHANGE])
        assert reader.number(1) == _NAMED_CURVE
        assert reader.number(2) == tls.X25519
        self._agree(reader.vector(1), client=True)
        return found

    def certificate(self, certificates: tuple[bytes, ...]) -> bytes:
        entries = b"".join(tls.vector(3, der) for der in certificates)
        return tls.message(tls.CERTIFICATE, tls.vector(3, entries))

    def key_exchange(self) -> bytes:
        return tls.message(tls.CLIENT_KEY_EXCHANGE, tls.vector(1, self.share))

    def verify(self, key: ec.EllipticCurvePrivateKey, scheme: int = 0x0403) -> bytes:
        digest = hashes.SHA1() if scheme == 0x0203 else hashes.SHA256()
        signature = key.sign(self.transcript, ec.ECDSA(digest))
        return tls.message(tls.CERTIFICATE_VERIFY, tls.u16s(scheme) + tls.vector(2, signature))

    def show(self, shown: Shown | None) -> None:
        """Do the rest of the handshake as it should be."""
        self.say(self.certificate(shown.certificates if shown else ()), self.key_exchange())
        if shown is not None and shown.key is not None:
            self.say(self.verify(shown.key))
        self.change_cipher_spec()
        self.say(self.finished(b"client finished"))
        assert self.read_message()[0] == tls.FINISHED

    def handshake(self, shown: Shown | None) -> None:
        self.hello()
        self.read_flight()
        self.show(shown)

    def ask(self, request: bytes) -> bytes:
        """Send a request and give the first line of the answer."""
        self.send(tls.APPLICATION_DATA, request)
        while b"\r\n\r\n" not in self.application_data:
            self.read_record()
        return self.application_data.partition(b"\r\n")[0]


class Server(Peer):
    """An impostor."""

    def read_client_hello(self) -> Hello:
        kind, body = self.read_message()
        assert kind == tls.CLIENT_HELLO
        hello = tls.read_hello(body)
        self.client_random, self.server_random = hello.random, os.urandom(32)
        return hello

    def hello(
        self,
        *,
        version: int = tls.TLS_1_2,
        suite: int = tls.ECDHE_ECDSA_AES_128_GCM_SHA256,
        compression: int = 0,
        extensions: bytes = b"",
    ) -> bytes:
        head = version.to_bytes(2) + self.server_random + b"\0" + tls.u16s(suite)
        known = tls.extension(tls.RENEGOTIATION_INFO, b"\0")
        rest = bytes([compression]) + tls.vector(2, known + extensions)
        return tls.message(tls.SERVER_HELLO, head + rest)

    def certificate(self, certificates: tuple[bytes, ...]) -> bytes:
        entries = b"".join(tls.vector(3, der) for der in certificates)
        return tls.message(tls.CERTIFICATE, tls.vector(3, entries))

    def key_exchange(
        self,
        key: ec.EllipticCurvePrivateKey,
        *,
        scheme: int = tls.ECDSA_P256_SHA256,
        group: int = tls.X25519,
        share: bytes | None = None,
        digest: hashes.HashAlgorithm | None = None,
    ) -> bytes:
        offered = self.share if share is None else share
        params = bytes([_NAMED_CURVE]) + tls.u16s(group) + tls.vector(1, offered)
        signed = self.client_random + self.server_random + params
        signature = key.sign(signed, ec.ECDSA(digest or hashes.SHA256()))
        return tls.message(
            tls.SERVER_KEY_EXCHANGE, params + tls.u16s(scheme) + tls.vector(2, signature)
        )

    def show(self, shown: Shown) -> None:
        """Do the whole of a good handshake, after the ClientHello."""
        assert shown.key is not None
        self.say(
            self.hello(),
            self.certificate(shown.certificates),
            self.key_exchange(shown.key),
            tls.message(tls.SERVER_HELLO_DONE, b""),
        )
        kind, body = self.read_message()
        assert kind == tls.CLIENT_KEY_EXCHANGE
        self._agree(Reader(body).vector(1), client=False)
        covered = self.read_message()
        assert covered[0] == tls.FINISHED
        self.change_cipher_spec()
        self.say(self.finished(b"server finished"))
