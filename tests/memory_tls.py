"""What TLS would have verified, for meshes without TLS: real chains, shown by hand."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_mesh.identity.snapshot import Snapshot
from dstack_mesh.model import AppId
from dstack_mesh.sim.kms import Kms
from tests.identities import APP_A, APP_B, snapshot_of
from tests.relay.fakes import FakeTransport

OURS = APP_A
"""The app that every mesh here is the sidecar of."""

TARGET = APP_B
"""The app that `TO_TARGET` names, and the caller of an inbound mesh."""

OTHER = AppId("cc" * 20)


class Shown(Enum):
    """What the other end of a TLS connection turns out to be."""

    TARGET = "a valid chain of the app asked for"
    OTHER_APP = "a valid chain of another app"
    OTHER_KMS = "a chain that verified, but under another root"
    NO_CHAIN = "a certificate and no verified chain"
    NOTHING = "no certificate at all"
    RESUMED = "a resumed session, which has no chain"
    UNVERIFIED = "a certificate that TLS does not verify"
    REFUSES_US = "an alert about our own certificate"
    RESET = "a connection that ends in the handshake"


@dataclass
class ShownTls:
    """What the mesh asks of an `ssl.SSLObject` once the handshake is done."""

    chain: list[bytes]
    leaf: bytes | None
    session_reused: bool = False
    context: None = None
    transport: FakeTransport | None = None

    def version(self) -> str:
        return "TLSv1.2"  # and so nothing is resumed

    def get_verified_chain(self) -> list[bytes]:
        return self.chain

    def getpeercert(self, binary_form: bool = False) -> bytes | None:
        assert binary_form
        return self.leaf


@lru_cache(maxsize=1)
def our_snapshot() -> Snapshot:
    return snapshot_of(Kms.create(b"memory mesh"), OURS)


@lru_cache(maxsize=32)
def _chain(app_id: AppId, kms: bytes) -> list[bytes]:
    issued = Kms.create(kms).issue(app_id)
    certificates = [x509.load_pem_x509_certificate(pem) for pem in issued.chain_pem]
    return [certificate.public_bytes(Encoding.DER) for certificate in certificates]


def shown_tls(shown: Shown, app_id: AppId) -> ShownTls:
    chain = _chain(app_id, b"memory mesh")
    if shown is Shown.TARGET:
        return ShownTls(chain, chain[0])
    if shown is Shown.OTHER_APP:
        other = _chain(OTHER if app_id != OTHER else TARGET, b"memory mesh")
        return ShownTls(other, other[0])
    if shown is Shown.OTHER_KMS:
        foreign = _chain(app_id, b"another")
        return ShownTls(foreign, foreign[0])
    if shown is Shown.RESUMED:
        return ShownTls([], chain[0], session_reused=True)
    if shown is Shown.NO_CHAIN:
        return ShownTls([], chain[0])
    if shown is Shown.NOTHING:
        return ShownTls([], None)
    raise _handshake_error(shown)


def _handshake_error(shown: Shown) -> OSError:
    if shown is Shown.UNVERIFIED:
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "self-signed certificate"
        return error
    if shown is Shown.REFUSES_US:
        alert = ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca")
        alert.reason = "TLSV1_ALERT_UNKNOWN_CA"
        return alert
    return ConnectionResetError("reset")
