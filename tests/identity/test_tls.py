"""Our contexts, and how failures of TLS are read."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from tests.identity.conftest import APP_A, APP_B, Issued, Kms, shake_hands

from dstack_mesh.identity import tls
from dstack_mesh.identity.chain import ChainRuleBroken
from dstack_mesh.identity.peers import verified_chain
from dstack_mesh.model import Role

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
VERSIONS = pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])

# Contexts


@VERSIONS
def test_both_contexts_verify_against_the_root_alone(kms: Kms, version: ssl.TLSVersion) -> None:
    credentials = kms.leaf().credentials
    client = tls.client_context(credentials, version)
    server = tls.server_context(credentials, version)
    assert client.verify_mode is ssl.CERT_REQUIRED
    assert server.verify_mode is ssl.CERT_OPTIONAL
    for context in (client, server):
        assert context.minimum_version is version
        assert context.check_hostname is False
        assert context.get_ca_certs(binary_form=True) == kms.root.chain
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert not context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert context.options & ssl.OP_NO_COMPRESSION
        has_tickets = context is server and version is TLS13
        assert bool(context.options & ssl.OP_NO_TICKET) is not has_tickets
        assert context.security_level == 2
        for cipher in context.get_ciphers():
            assert cipher["aead"]
            assert cipher["kea"] in ("kx-any", "kx-ecdhe")


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@VERSIONS
def test_two_apps_meet(kms: Kms, version: ssl.TLSVersion) -> None:
    server_context = tls.server_context(kms.leaf("cc" * 20).credentials, version)
    client_context = tls.client_context(kms.leaf(APP_A).credentials, version)
    client_context.maximum_version = version
    server, client = shake_hands(server_context, client_context)
    assert server.version() == {TLS12: "TLSv1.2", TLS13: "TLSv1.3"}[version]
    peers = tls.VerifiedPeers(kms.root.root_spki)
    caller, target = peers.identify(server, Role.CALLER), peers.identify(client, Role.TARGET)
    assert caller is not None
    assert target is not None
    assert (caller.app_id, target.app_id) == (APP_A, "cc" * 20)


def test_tls_1_2_is_refused_unless_allowed(kms: Kms) -> None:
    credentials = kms.leaf().credentials
    old = tls.client_context(credentials, TLS12)
    old.maximum_version = TLS12
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        shake_hands(tls.server_context(credentials, TLS13), old)
    shake_hands(tls.server_context(credentials, TLS12), old)


def test_tls_1_3_is_taken_where_1_2_is_allowed(kms: Kms) -> None:
    credentials = kms.leaf().credentials
    server, _ = shake_hands(
        tls.server_context(credentials, TLS12), tls.client_context(credentials, TLS12)
    )
    assert server.version() == "TLSv1.3"


# Resumption


def eager_caller(issued: Issued | None, version: ssl.TLSVersion = TLS13) -> ssl.SSLContext:
    """Give a caller with tickets and session ids, as contexts have them by default."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    if issued is not None:
        tls._load_key(context, issued.credentials)
    return context


def session_of(
    server_context: ssl.SSLContext, caller: ssl.SSLContext, peers: tls.VerifiedPeers
) -> ssl.SSLSession | None:
    """Do a full handshake, have the caller identified, and give what it may resume."""
    server, client = shake_hands(server_context, caller)
    peers.identify(server, Role.CALLER)
    with pytest.raises(ssl.SSLWantReadError):
        client.read(1)  # where a TLS 1.3 ticket arrives
    return client.session


def test_a_caller_resumes_its_session_as_who_it_was(kms: Kms) -> None:
    leaf = kms.leaf()
    context = tls.server_context(kms.leaf().credentials, TLS13)
    peers, caller = tls.VerifiedPeers(kms.root.root_spki), eager_caller(leaf)
    session = session_of(context, caller, peers)
    assert session is not None
    assert session.has_ticket
    server, _ = shake_hands(context, caller, session)
    assert server.session_reused
    assert verified_chain(server) == []
    found = peers.identify(server, Role.CALLER)
    assert found is not None
    assert found.app_id == APP_A


def test_a_resumed_session_ends_with_the_callers_chain(kms: Kms) -> None:
    context = tls.server_context(kms.leaf().credentials, TLS13)
    now = [time.time()]
    peers = tls.VerifiedPeers(kms.root.root_spki, clock=lambda: now[0])
    caller = eager_caller(kms.leaf())
    session = session_of(context, caller, peers)
    server, _ = shake_hands(context, caller, session)
    now[0] += 200 * 365 * 86_400
    assert server.session_reused
    with pytest.raises(ChainRuleBroken, match="expired"):
        peers.identify(server, Role.CALLER)


def test_nothing_is_resumed_with_another_context(kms: Kms) -> None:
    """As behind a renewal of our own: the ticket's key is gone, and the handshake is a full one."""
    credentials = kms.leaf().credentials
    peers, caller = tls.VerifiedPeers(kms.root.root_spki), eager_caller(kms.leaf())
    session = session_of(tls.server_context(credentials, TLS13), caller, peers)
    server, _ = shake_hands(tls.server_context(credentials, TLS13), caller, session)
    assert not server.session_reused


def test_a_session_whose_chain_was_never_found_good_is_good_for_nothing(kms: Kms) -> None:
    """Another app's CA has signed the leaf: OpenSSL verifies it, the chain rules do not."""
    liar = kms.leaf(issuer=kms.app_ca(APP_B))
    context = tls.server_context(kms.leaf().credentials, TLS13)
    peers, caller = tls.VerifiedPeers(kms.root.root_spki), eager_caller(liar)
    server, client = shake_hands(context, caller)
    for _ in range(2):
        with pytest.raises(ChainRuleBroken):
            peers.identify(server, Role.CALLER)
        with pytest.raises(ssl.SSLWantReadError):
            client.read(1)
        server, client = shake_hands(context, caller, client.session)
        assert server.session_reused


def test_a_caller_without_certificate_stays_one(kms: Kms) -> None:
    context = tls.server_context(kms.leaf().credentials, TLS13)
    peers, caller = tls.VerifiedPeers(kms.root.root_spki), eager_caller(None)
    session = session_of(context, caller, peers)
    server, _ = shake_hands(context, caller, session)
    assert server.session_reused
    assert peers.identify(server, Role.CALLER) is None


def test_more_callers_than_are_known_do_a_full_handshake(
    kms: Kms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_MAX_CALLERS", 2)
    context = tls.server_context(kms.leaf().credentials, TLS13)
    peers = tls.VerifiedPeers(kms.root.root_spki)
    callers = [eager_caller(kms.leaf()) for _ in range(5)]
    sessions = [session_of(context, caller, peers) for caller in callers]
    for caller, session in zip(callers, sessions, strict=True):
        server, _ = shake_hands(context, caller, session)
        assert peers.identify(server, Role.CALLER) is not None, "nobody is refused for it"
    server, _ = shake_hands(context, callers[0], sessions[0])
    assert not server.session_reused
    server, _ = shake_hands(context, callers[4], session_of(context, callers[4], peers))
    assert server.session_reused


@VERSIONS
def test_where_1_2_is_allowed_there_is_nothing_to_resume(kms: Kms, version: ssl.TLSVersion) -> None:
    leaf = kms.leaf()
    server_context = tls.server_context(leaf.credentials, TLS12)
    caller = eager_caller(leaf, version)
    session = session_of(server_context, caller, tls.VerifiedPeers(kms.root.root_spki))
    assert session is None or not session.has_ticket
    server, client = shake_hands(server_context, caller, session)
    assert not server.session_reused
    assert not client.session_reused
    assert tls.VerifiedPeers(kms.root.root_spki).identify(server, Role.CALLER) is not None


def test_the_key_is_neither_shown_nor_left_behind(
    kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    credentials = kms.leaf().credentials
    before = open_files()
    for make in (tls.client_context, tls.server_context):
        make(credentials, TLS13)
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []
    assert "PRIVATE KEY" not in repr(credentials)
    assert credentials.key_pem.split(b"\n")[1].decode() not in repr(credentials)


@pytest.mark.parametrize("make", [tls.client_context, tls.server_context])
def test_a_key_that_is_not_the_leafs_is_an_error(
    kms: Kms, make: Callable[[tls.Credentials, ssl.TLSVersion], ssl.SSLContext]
) -> None:
    credentials = replace(kms.leaf().credentials, key_pem=kms.leaf().key_pem)
    before = open_files()
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        make(credentials, TLS13)
    assert open_files() == before


def test_an_encrypted_key_is_an_error_and_not_a_question_on_the_terminal(kms: Kms) -> None:
    leaf = kms.leaf()
    encrypted = leaf.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(ssl.SSLError):
        tls.client_context(replace(leaf.credentials, key_pem=encrypted), TLS13)


# Failures


def caller_context(issued: Issued | None, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = version
    if issued is not None:
        tls._load_key(context, issued.credentials)
    return context


def alert_error(code: int) -> ssl.SSLError:
    """Return what a client's handshake raises when the fatal alert `code` arrives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming = ssl.MemoryBIO()
    ssl_object = context.wrap_bio(incoming, ssl.MemoryBIO())
    with pytest.raises(ssl.SSLWantReadError):
        ssl_object.do_handshake()
    incoming.write(bytes([21, 3, 3, 0, 2, 2, code]))
    with pytest.raises(ssl.SSLError) as error:
        ssl_object.do_handshake()
    return error.value


_ABOUT_OUR_CERTIFICATE = {
    41: "no_certificate",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    48: "unknown_ca",
    49: "access_denied",
    51: "decrypt_error",
    111: "certificate_unobtainable",
    113: "bad_certificate_status_response",
    114: "bad_certificate_hash_value",
    116: "certificate_required",
}
_OTHER_ALERTS = {
    10: "unexpected_message",
    20: "bad_record_mac",
    40: "handshake_failure",
    47: "illegal_parameter",
    50: "decode_error",
    70: "protocol_version",
    80: "internal_error",
    109: "missing_extension",
    112: "unrecognized_name",
}


@pytest.mark.parametrize("code", range(1, 256))
def test_every_alert_about_our_certificate_is_a_refusal_of_it_and_no_other(code: int) -> None:
    if code == 90:  # user_canceled is followed by close_notify and not an error by itself
        return
    error = alert_error(code)
    assert tls.refused_our_certificate(error) is (code in _ABOUT_OUR_CERTIFICATE)
    description = tls.describe_tls_failure(error)
    if code in _ABOUT_OUR_CERTIFICATE:
        expected = f"the peer refused our certificate (alert {_ABOUT_OUR_CERTIFICATE[code]})"
        assert description == expected
    elif code in _OTHER_ALERTS:
        assert description == f"the peer sent the alert {_OTHER_ALERTS[code]}"
    else:
        assert description


@VERSIONS
def test_a_refusal_is_known_when_it_arrives_after_our_side_of_the_handshake(
    kms: Kms, version: ssl.TLSVersion
) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls.server_context(kms.leaf().credentials, version).wrap_bio(
        to_server, to_client, server_side=True
    )
    client = caller_context(Kms().leaf(), version).wrap_bio(to_client, to_server)
    errors: dict[ssl.SSLObject, ssl.SSLError] = {}
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as exc:
                errors.setdefault(side, exc)
    if version is TLS13:
        with pytest.raises(ssl.SSLError) as shown:
            client.read(1)
        errors[client] = shown.value
    assert tls.refused_our_certificate(errors[client])
    assert not tls.refused_our_certificate(errors[server]), "our own refusal is not the peer's"


def not_trusted(kms: Kms) -> ssl.SSLError:
    with pytest.raises(ssl.SSLCertVerificationError) as error:
        shake_hands(
            tls.server_context(Kms().leaf().credentials, TLS13),
            tls.client_context(kms.leaf().credentials, TLS13),
        )
    return error.value


def test_other_failures_are_described_too(kms: Kms) -> None:
    old, new = (tls.client_context(kms.leaf().credentials, TLS12) for _ in range(2))
    old.maximum_version = TLS12
    with pytest.raises(ssl.SSLError) as no_common_version:
        shake_hands(tls.server_context(kms.leaf().credentials, TLS13), old)
    with pytest.raises(ssl.SSLError) as other:
        new.load_verify_locations(cadata=b"nonsense")
    descriptions = {
        not_trusted(kms): "the peer's certificate is not trusted: certificate signature failure",
        no_common_version.value: "the peer has no TLS version in common with us",
        ssl.SSLEOFError(): "the peer ended the connection during the TLS handshake",
        ConnectionResetError(): "the peer ended the connection during the TLS handshake",
        ConnectionAbortedError(): "the TLS handshake took too long",
        TimeoutError(): "the TLS handshake took too long",
        OSError("no buffer"): "TLS failed: no buffer",
        ValueError(): "TLS failed: ValueError",
    }
    for exc, description in descriptions.items():
        assert tls.describe_tls_failure(exc) == description
        assert not tls.refused_our_certificate(exc)
    assert tls.describe_tls_failure(other.value).startswith("TLS failed: not enough data")
