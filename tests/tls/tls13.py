"""Both ends of TLS 1.3 by hand (RFC 8446): X25519, AES-128-GCM, SHA-256, and any certificate.

Every message can be left out, changed or sent twice, so a caller or an impostor can be as wrong
as a test wants while the rest of its handshake is right.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dstack_mesh.sim.certificates import Issued
from tests.tls import records as tls
from tests.tls.records import Channel, Hello, Reader

_EMPTY = hashlib.sha256(b"").digest()
_CLIENT_CONTEXT = b"TLS 1.3, client CertificateVerify"
_SERVER_CONTEXT = b"TLS 1.3, server CertificateVerify"


class AlertReceived(Exception):  # noqa: N818 - it says what happened
    """The other side sent an alert; `code` is its description."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Ended(Exception):  # noqa: N818 - it says what happened
    """The connection ended."""


@dataclass
class Shown:
    """What a peer shows: certificates in any order, and the key that it signs with, if any."""

    certificates: tuple[bytes, ...]
    """DER."""
    key: ec.EllipticCurvePrivateKey | None

    @classmethod
    def of(cls, issued: Issued) -> Shown:
        key = serialization.load_pem_private_key(issued.key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        certs = [x509.load_pem_x509_certificate(pem) for pem in issued.chain_pem]
        der = tuple(cert.public_bytes(serialization.Encoding.DER) for cert in certs)
        return cls(der, key)


def expand_label(secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
    info = size.to_bytes(2) + tls.vector(1, b"tls13 " + label) + tls.vector(1, context)
    return hmac.digest(secret, info + b"\1", "sha256")[:size]


class Protection:
    """One direction under one traffic secret (RFC 8446 5.2 and 7.3)."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._aead = AESGCM(expand_label(secret, b"key", b"", 16))
        self._iv = int.from_bytes(expand_label(secret, b"iv", b"", 12))
        self._sequence = 0

    def seal(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        inner = content + bytes([kind]) + bytes(padding)
        header = bytes([tls.APPLICATION_DATA, 3, 3]) + (len(inner) + 16).to_bytes(2)
        return header + self._aead.encrypt(self._nonce(), inner, header)

    def open(self, sealed: bytes) -> tuple[int, bytes]:
        header = bytes([tls.APPLICATION_DATA, 3, 3]) + len(sealed).to_bytes(2)
        inner = self._aead.decrypt(self._nonce(), sealed, header).rstrip(b"\0")
        return inner[-1], inner[:-1]

    def updated(self) -> Protection:
        """Give what follows a KeyUpdate."""
        return Protection(expand_label(self.secret, b"traffic upd", b"", 32))

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self._sequence).to_bytes(12)
        self._sequence += 1
        return nonce


class Peer:
    """What both ends share: records, transcript, key schedule."""

    own_context: bytes
    own_label: bytes
    other_label: bytes

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.transcript = b""
        self.sending: Protection | None = None
        self.receiving: Protection | None = None
        self.application_data = b""
        """All that arrived and was decrypted."""
        self._key = X25519PrivateKey.generate()
        self._handshake_secret = b""
        self._raw = b""
        self._messages = b""
        self._record_kind = tls.HANDSHAKE

    @property
    def share(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    # Sending.

    def send(self, kind: int, content: bytes, padding: int = 0) -> None:
        """Send one record, protected where keys are there."""
        self.channel.send(self.sealed(kind, content, padding))

    def sealed(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        if self.sending is None:
            return tls.record(kind, content)
        return self.sending.seal(kind, content, padding)

    def say(self, *messages: bytes) -> None:
        """Send handshake messages, and count them into the transcript."""
        content = b"".join(messages)
        self.transcript += content
        pieces = range(0, len(content), tls.MAX_PLAINTEXT)
        self.channel.send(
            b"".join(
                self.sealed(tls.HANDSHAKE, content[at : at + tls.MAX_PLAINTEXT]) for at in pieces
            )
        )

    def certificate(self, certificates: Iterable[bytes], context: bytes = b"") -> bytes:
        entries = b"".join(tls.vector(3, der) + tls.vector(2, b"") for der in certificates)
        body = tls.vector(1, context) + tls.vector(3, entries)
        return tls.message(tls.CERTIFICATE, body)

    def verify(
        self,
        key: ec.EllipticCurvePrivateKey,
        before: bytes,
        *,
        scheme: int = tls.ECDSA_P256_SHA256,
        context: bytes | None = None,
        digest: hashes.HashAlgorithm | None = None,
    ) -> bytes:
        """Sign the transcript with `before`, the messages just before this one, added to it."""
        covered = hashlib.sha256(self.transcript + before).digest()
        signed = b" " * 64 + (context or self.own_context) + b"\0" + covered
        signature = key.sign(signed, ec.ECDSA(digest or hashes.SHA256()))
        return tls.message(tls.CERTIFICATE_VERIFY, tls.u16s(scheme) + tls.vector(2, signature))

    def finished(self, before: bytes = b"") -> bytes:
        assert self.sending is not None
        key = expand_label(self.sending.secret, b"finished", b"", 32)
        covered = hashlib.sha256(self.transcript + before).digest()
        return tls.message(tls.FINISHED, hmac.digest(key, covered, "sha256"))

    # Receiving.

    def read_record(self) -> tuple[int, bytes]:
        """Give the next record's kind and content. Raises `AlertReceived`, `Ended`."""
        while True:
            while len(self._raw) < 5 or len(self._raw) < 5 + int.from_bytes(self._raw[3:5]):
                piece = self.channel.receive()
                if not piece:
                    raise Ended
                self._raw += piece
            end = 5 + int.from_bytes(self._raw[3:5])
            kind, content, self._raw = self._raw[0], self._raw[5:end], self._raw[end:]
            if kind == tls.CHANGE_CIPHER_SPEC:
                continue
            if kind == tls.APPLICATION_DATA:
                assert self.receiving is not None, "protected before there were keys"
                kind, content = self.receiving.open(content)
            if kind == tls.ALERT:
                raise AlertReceived(content[1])
            if kind == tls.APPLICATION_DATA:
                self.application_data += content
            return kind, content

    def read_message(self) -> tuple[int, bytes]:
        """Give the next handshake message's kind and body, counted into the transcript."""
        while len(self._messages) < 4 or len(self._messages) < 4 + self._size():
            kind, content = self.read_record()
            assert kind == tls.HANDSHAKE, f"a record of kind {kind} in a handshake"
            self._messages += content
        end = 4 + self._size()
        whole, self._messages = self._messages[:end], self._messages[end:]
        self.transcript += whole
        return whole[0], whole[4:]

    def _size(self) -> int:
        return int.from_bytes(self._messages[1:4])

    def read_until(self, condition: Callable[[bytes], bool]) -> bytes:
        """Read application data until `condition` holds of all that came; give it."""
        while not condition(self.application_data):
            self.read_record()
        return self.application_data

    def read_to_end(self) -> int | None:
        """Read to the end of the connection; give the alert that came, if one did."""
        alert = None
        while True:
            try:
                self.read_record()
            except AlertReceived as received:
                alert = received.code if alert is None else alert
            except Ended:
                return alert

    # Keys.

    def _agree(self, other_share: bytes) -> None:
        shared = self._key.exchange(X25519PublicKey.from_public_bytes(other_share))
        early = hmac.digest(bytes(32), bytes(32), "sha256")
        derived = expand_label(early, b"derived", _EMPTY, 32)
        self._handshake_secret = hmac.digest(derived, shared, "sha256")
        self.sending = self._protection(self._handshake_secret, self.own_label + b" hs traffic")
        self.receiving = self._protection(self._handshake_secret, self.other_label + b" hs traffic")

    def application_keys(self) -> tuple[Protection, Protection]:
        """Give those for sending and for receiving, with the transcript up to now."""
        derived = expand_label(self._handshake_secret, b"derived", _EMPTY, 32)
        master = hmac.digest(derived, bytes(32), "sha256")
        sending = self._protection(master, self.own_label + b" ap traffic")
        return sending, self._protection(master, self.other_label + b" ap traffic")

    def _protection(self, secret: bytes, label: bytes) -> Protection:
        covered = hashlib.sha256(self.transcript).digest()
        return Protection(expand_label(secret, label, covered, 32))


class Client(Peer):
    """A caller."""

    own_context, own_label, other_label = _CLIENT_CONTEXT, b"c", b"s"

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.server_extensions: dict[int, bytes] = {}
        self.encrypted_extensions: dict[int, bytes] = {}
        self._application: tuple[Protection, Protection] | None = None
        self.asked_for_certificate = False

    def hello(self, *more: bytes, session_id: bytes = b"") -> None:
        hello = Hello(session_id=session_id, suites=(tls.AES_128_GCM_SHA256,))
        hello.extensions = [*tls.usual_extensions(share=self.share), *more]
        self.say(hello.message())

    def read_flight(self) -> None:
        """Read the server's messages up to its Finished."""
        kind, body = self.read_message()
        assert kind == tls.SERVER_HELLO
        reader = Reader(body)
        reader.take(34)
        reader.vector(1)
        assert reader.number(2) == tls.AES_128_GCM_SHA256
        assert reader.number(1) == 0, "no compression"
        self.server_extensions = tls.read_extensions(reader.vector(2))
        share = Reader(self.server_extensions[tls.KEY_SHARE])
        assert share.number(2) == tls.X25519
        self._agree(share.vector(2))
        while kind != tls.FINISHED:
            kind, body = self.read_message()
            if kind == tls.ENCRYPTED_EXTENSIONS:
                self.encrypted_extensions = tls.read_extensions(Reader(body).vector(2))
            self.asked_for_certificate |= kind == tls.CERTIFICATE_REQUEST
        self._application = self.application_keys()
        # The server has finished sending handshake messages: what it says next is under these.
        self.receiving = self._application[1]

    def switch(self) -> None:
        """Send under the application's keys from now on."""
        assert self._application is not None
        self.sending = self._application[0]

    def show(self, shown: Shown | None) -> None:
        """Send certificate, proof and Finished, as they should be; none where there is none."""
        certificate = self.certificate(shown.certificates if shown else ())
        said = certificate
        if shown is not None and shown.key is not None:
            said += self.verify(shown.key, certificate)
        self.say(said + self.finished(said))
        self.switch()

    def handshake(self, shown: Shown | None) -> None:
        self.hello()
        self.read_flight()
        self.show(shown)

    def ask(self, request: bytes) -> bytes:
        """Send a request and give the first line of the answer."""
        self.send(tls.APPLICATION_DATA, request)
        return self.read_until(lambda data: b"\r\n\r\n" in data).partition(b"\r\n")[0]


class Server(Peer):
    """An impostor."""

    own_context, own_label, other_label = _SERVER_CONTEXT, b"s", b"c"

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.client_hello = Hello()

    def read_client_hello(self) -> None:
        kind, body = self.read_message()
        assert kind == tls.CLIENT_HELLO
        self.client_hello = tls.read_hello(body)

    def client_extensions(self) -> dict[int, bytes]:
        return tls.read_extensions(b"".join(self.client_hello.extensions))

    def server_hello(
        self,
        *more: bytes,
        suite: int = tls.AES_128_GCM_SHA256,
        compression: int = 0,
        version: int = tls.TLS_1_3,
        legacy: int = tls.TLS_1_2,
    ) -> bytes:
        extensions = [
            tls.extension(tls.VERSIONS, tls.u16s(version)),
            tls.extension(tls.KEY_SHARE, tls.u16s(tls.X25519) + tls.vector(2, self.share)),
            *more,
        ]
        head = legacy.to_bytes(2) + os.urandom(32) + tls.vector(1, self.client_hello.session_id)
        rest = tls.u16s(suite) + bytes([compression]) + tls.vector(2, b"".join(extensions))
        return tls.message(tls.SERVER_HELLO, head + rest)

    def agree(self) -> None:
        """Send the ServerHello and take the handshake's keys."""
        self.say(self.server_hello())
        shares = Reader(Reader(self.client_extensions()[tls.KEY_SHARE]).vector(2))
        assert shares.number(2) == tls.X25519
        self._agree(shares.vector(2))

    def encrypted_extensions(self, *extensions: bytes) -> bytes:
        return tls.message(tls.ENCRYPTED_EXTENSIONS, tls.vector(2, b"".join(extensions)))

    def certificate_request(self, context: bytes = b"") -> bytes:
        signatures = tls.vector(2, tls.u16s(tls.ECDSA_P256_SHA256))
        extensions = tls.vector(2, tls.extension(tls.SIGNATURES, signatures))
        return tls.message(tls.CERTIFICATE_REQUEST, tls.vector(1, context) + extensions)

    def flight(self, shown: Shown, *, ask: bool = False) -> bytes:
        """Give what follows the ServerHello, all as it should be."""
        said = self.encrypted_extensions() + (self.certificate_request() if ask else b"")
        said += self.certificate(shown.certificates)
        if shown.key is not None:
            said += self.verify(shown.key, said)
        return said + self.finished(said)

    def show(self, flight: bytes) -> None:
        """Send what follows the ServerHello; the client's answer is read under its own keys."""
        client_keys = self.receiving
        self.say(flight)
        sending, receiving = self.application_keys()
        self.sending = sending
        self.receiving = client_keys
        self._client_application = receiving

    def read_answer(self) -> list[int]:
        """Read the client's side up to its Finished; give the kinds of its messages."""
        kinds: list[int] = []
        while not kinds or kinds[-1] != tls.FINISHED:
            kinds.append(self.read_message()[0])
        self.receiving = self._client_application
        return kinds
