"""What our server's context takes, of all that there is, offered one at a time."""

from __future__ import annotations

import ssl
from collections.abc import Iterable

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from dstack_mesh.identity import tls as ours
from tests.identity.conftest import Kms
from tests.tls import records as tls
from tests.tls import tls13
from tests.tls.records import Hello, MemoryChannel

AEAD_1_2 = {
    "ecdsa": {0xC02B, 0xC02C, 0xCCA9},
    "rsa": {0xC02F, 0xC030, 0xCCA8},
}
"""ECDHE with AES-GCM or ChaCha20-Poly1305 (RFC 9325 4.2), by the key of our certificate."""
AEAD_1_3 = {0x1301, 0x1302, 0x1303}
STRONG_GROUPS = {0x0017, 0x0018, 0x0019, 0x001D, 0x001E, *range(0x0100, 0x0105)}
"""P-256, P-384, P-521, X25519, X448, and the groups of RFC 7919 (TLS 1.3 only)."""
SUITES = [*range(0x0100), *range(0x1300, 0x1310), *range(0xC000, 0xC100)]
SUITES += [*range(0xCC00, 0xCD00), *range(0xD000, 0xD010), *range(0xFEF0, 0xFF00)]


def answers_to(context: ssl.SSLContext, hello: Hello) -> list[int]:
    """Give the kinds of the messages that the server answers with; none is a refusal."""
    channel = MemoryChannel(context, server_side=True)
    channel.send(hello.record())
    data = channel.receive()
    return [kind for kind, _ in tls.handshake_messages(data)]


@pytest.fixture(scope="module")
def identity() -> Kms:
    return Kms()


def server_of(kms: Kms, key: str, version: ssl.TLSVersion) -> ssl.SSLContext:
    own = rsa.generate_private_key(65_537, 2048) if key == "rsa" else None
    return ours.server_context(kms.leaf(key=own).credentials, version)


@pytest.mark.parametrize("key", AEAD_1_2)
def test_of_all_suites_of_1_2_only_aead_with_forward_secrecy(identity: Kms, key: str) -> None:
    """No CBC, RC4, 3DES, NULL or export suite, no RSA, static or anonymous key exchange, no PSK."""
    context = server_of(identity, key, ssl.TLSVersion.TLSv1_2)
    extensions = tls.usual_extensions(versions=(tls.TLS_1_2,), groups=(0x1D, 0x17, 0x18))
    extensions.append(tls.extension(tls.POINT_FORMATS, b"\1\0"))
    taken = {
        suite
        for suite in SUITES
        if answers_to(context, Hello(suites=(suite,), extensions=extensions))
    }
    assert taken == AEAD_1_2[key]


def test_of_all_suites_of_1_3_only_aead(identity: Kms) -> None:
    context = server_of(identity, "ecdsa", ssl.TLSVersion.TLSv1_3)
    share = tls13.Client(MemoryChannel(context, server_side=True)).share
    extensions = tls.usual_extensions(share=share)
    taken = {
        suite
        for suite in SUITES
        if answers_to(context, Hello(suites=(suite,), extensions=extensions))
    }
    assert taken == AEAD_1_3


GROUPS = [*range(0x0001, 0x0030), *range(0x0100, 0x0110), 0xFF01, 0xFF02, 0x11EC]


@pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3])
def test_only_strong_groups(identity: Kms, version: int) -> None:
    # An RSA key, as an ECDSA one has a curve that a caller of 1.2 must know (RFC 8422 5.3).
    context = server_of(identity, "rsa", ssl.TLSVersion.TLSv1_2)

    def taken(group: int) -> bool:
        extensions = tls.usual_extensions(versions=(version,), groups=(group,))
        return bool(answers_to(context, Hello(suites=(0x1301, 0xC02F), extensions=extensions)))

    found = {group for group in GROUPS if taken(group)}
    assert found <= STRONG_GROUPS
    assert {tls.X25519, tls.SECP256R1} <= found


WEAK_SIGNATURES = {
    "MD5": (0x0101, 0x0103),
    "SHA-1": (0x0201, 0x0202, 0x0203),
    "DSA": (0x0202, 0x0402, 0x0602),
    "anonymous": (0x0000, 0x0400),
}


@pytest.mark.parametrize("version", [tls.TLS_1_2, tls.TLS_1_3])
@pytest.mark.parametrize("name", WEAK_SIGNATURES)
@pytest.mark.parametrize("key", AEAD_1_2)
def test_our_server_does_not_sign_weakly(identity: Kms, name: str, version: int, key: str) -> None:
    context = server_of(identity, key, ssl.TLSVersion.TLSv1_2)
    share = tls13.Client(MemoryChannel(context, server_side=True)).share

    def kinds(schemes: Iterable[int]) -> list[int]:
        extensions = tls.usual_extensions(
            versions=(version,), groups=(0x1D, 0x17), signatures=tuple(schemes), share=share
        )
        return answers_to(context, Hello(suites=(0x1301, 0xC02B, 0xC02F), extensions=extensions))

    assert kinds((*WEAK_SIGNATURES[name], 0x0403, 0x0804))[:1] == [tls.SERVER_HELLO]
    # 1.3 answers with a ServerHello before it looks for a signature, then with an alert.
    channel = MemoryChannel(context, server_side=True)
    extensions = tls.usual_extensions(
        versions=(version,),
        groups=(0x1D, 0x17),
        signatures=WEAK_SIGNATURES[name],
        share=share,
    )
    channel.send(Hello(suites=(0x1301, 0xC02B, 0xC02F), extensions=extensions).record())
    assert channel.failure is not None
    assert tls.CERTIFICATE not in [k for k, _ in tls.handshake_messages(channel.receive())]
