"""Certificates for people: read them, say who they claim to be, judge their chain offline.

What a peer or a file holds is shown as it is, also where it is malformed; only `judge` decides,
and it decides with the mesh's own chain rules.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from dstack_mesh.identity import extension
from dstack_mesh.identity.chain import ChainRuleBroken, check_chain, spki, verify_links
from dstack_mesh.identity.extension import ExtensionMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dstack_mesh.model import AppId, Role, TcpAddress


_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for each step on the way to a peer's chain."""


class UnreadableError(Exception):
    """There are no certificates to be had; the message is one line for the reader."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a chain holds. `roles` are those in which it does; `reason` says why in none."""

    roles: tuple[Role, ...]
    app_id: AppId | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Tell whether it holds in any of the roles it was judged for."""
        return bool(self.roles)


Value = str | list[str] | dict[str, str] | None
"""A field's value for people and for JSON; None where the certificate has no such thing."""


@dataclass(frozen=True, slots=True)
class Described:
    """What one certificate says of itself, by field name; `app_id` is None if it can't be read."""

    app_id: AppId | None
    fields: dict[str, Value] = field(default_factory=dict)


def read_certificates(content: bytes) -> list[x509.Certificate]:
    """Read PEM (one certificate or more, other blocks between them skipped) or one in DER.

    Raises `UnreadableError`.
    """
    if not content.strip():
        raise UnreadableError("it is empty")
    if b"-----BEGIN " in content and b"CERTIFICATE-----" not in content:
        held = "a private key" if b"PRIVATE KEY-----" in content else "something else"
        raise UnreadableError(f"it holds {held} and no certificate")
    # A serial number of zero or a stray encoding is a warning of the library: here it is shown.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if b"-----BEGIN " in content:
                return x509.load_pem_x509_certificates(content)
            return [x509.load_der_x509_certificate(content)]
        except Exception as error:
            raise UnreadableError(
                f"it is neither a PEM nor a DER certificate: {_one_line(error)}"
            ) from error


def fetch_certificates(address: TcpAddress, server_name: str | None) -> list[x509.Certificate]:
    """Do a TLS handshake without a certificate of our own; give what the server sent, leaf first.

    Nothing is verified and nothing is sent after the handshake. Raises `UnreadableError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # To show a peer that the mesh would refuse, it has to be let as far as its certificate.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    try:
        with (
            socket.create_connection((address.host, address.port), HANDSHAKE_TIMEOUT) as raw,
            context.wrap_socket(raw, server_hostname=server_name) as tls,
        ):
            chain = _sent_chain(tls)
    except TimeoutError as error:
        raise UnreadableError(f"no answer within {HANDSHAKE_TIMEOUT:g} s") from error
    except ssl.SSLError as error:
        raise UnreadableError(f"no TLS session: {error.reason or _one_line(error)}") from error
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or _one_line(error)
        raise UnreadableError(f"no connection: {reason}") from error
    return [certificate for der in chain for certificate in read_certificates(der)]


def _sent_chain(tls: ssl.SSLSocket) -> list[bytes]:
    public = getattr(tls, "get_unverified_chain", None)  # from Python 3.13
    if public is not None:
        return list(public())
    inner: Any = tls._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - the same, in 3.11
    return [ssl.PEM_cert_to_DER_cert(link.public_bytes()) for link in inner.get_unverified_chain()]


def judge(
    certificates: Sequence[x509.Certificate],
    root: x509.Certificate,
    roles: Sequence[Role],
    now: float,
) -> Verdict:
    """Judge the chain of `certificates[0]` by the KMS `root` at `now` (seconds since 1970).

    The other certificates are what the peer sent along, in any order; none of them is trusted.
    """
    try:
        chain = [cert.public_bytes(Encoding.DER) for cert in _path(certificates, root)]
        verify_links(chain, now)
    except ChainRuleBroken as broken:
        return Verdict((), reason=_printable(str(broken)))
    held: list[Role] = []
    app_id, reason = None, ""
    for role in roles:
        try:
            app_id = check_chain(chain, role, spki(root)).app_id
            held.append(role)
        except ChainRuleBroken as broken:
            reason = reason or _printable(str(broken))
    return Verdict(tuple(held), app_id, "" if held else reason)


def _path(
    certificates: Sequence[x509.Certificate], root: x509.Certificate
) -> list[x509.Certificate]:
    """Give the way from the leaf to `root`, of any length; raises `ChainRuleBroken`."""
    path, left = [certificates[0]], list(certificates[1:])
    while not _issued(path[-1], root):
        issuer = next((cert for cert in (path[-1], *left) if _issued(path[-1], cert)), None)
        if issuer is None or issuer is path[-1]:
            what = "leaf" if len(path) == 1 else "last certificate of its chain"
            others = "by itself, and not" if issuer else "neither by another that is there nor"
            raise ChainRuleBroken(1, f"the {what} is signed {others} by the root")
        left.remove(issuer)
        path.append(issuer)
    return [*path, root]


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:
        # A bad signature, another name, a key or an algorithm that is not known: not this one.
        return False
    return True


def describe(certificate: x509.Certificate, now: float) -> Described:
    """Say what `certificate` claims, field by field; what can't be read says why."""
    try:
        app_id: AppId | None = extension.app_id(certificate)
    except ValueError:
        app_id = None
    readers: dict[str, Callable[[], Value]] = {
        "subject": lambda: certificate.subject.rfc4514_string(),
        "issuer": lambda: certificate.issuer.rfc4514_string(),
        "app_id": lambda: _app_id(certificate),
        "usage": lambda: extension.usage(certificate),
        "validity": lambda: _validity(certificate, now),
        "not_before": lambda: f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
        "not_after": lambda: f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "ca": lambda: _ca(certificate),
        "extended_key_usage": lambda: _extended_key_usage(certificate),
        "alt_names": lambda: _alt_names(certificate),
        "key": lambda: _key(certificate),
        "app_info": lambda: _app_info(certificate),
        "serial": lambda: f"{certificate.serial_number:x}",
        "sha256": lambda: certificate.fingerprint(hashes.SHA256()).hex(),
    }
    return Described(app_id, {name: _read(reader) for name, reader in readers.items()})


def _app_id(certificate: x509.Certificate) -> str | None:
    try:
        return extension.app_id(certificate)
    except ExtensionMissingError:
        return None


def _validity(certificate: x509.Certificate, now: float) -> str:
    if now < certificate.not_valid_before_utc.timestamp():
        return "not yet valid"
    return "valid" if now < certificate.not_valid_after_utc.timestamp() else "expired"


def _ca(certificate: x509.Certificate) -> str:
    known = _known(certificate, x509.BasicConstraints)
    if known is None or not known.ca:
        return "no"
    return "yes" if known.path_length is None else f"yes, path length {known.path_length}"


def _extended_key_usage(certificate: x509.Certificate) -> list[str] | None:
    """None is good for any role (RFC 5280 4.2.1.12)."""
    known = _known(certificate, x509.ExtendedKeyUsage)
    return None if known is None else [getattr(oid, "_name", oid.dotted_string) for oid in known]


def _alt_names(certificate: x509.Certificate) -> list[str] | None:
    known = _known(certificate, x509.SubjectAlternativeName)
    return None if known is None else [str(getattr(name, "value", name)) for name in known]


def _key(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    kind = type(key).__name__.removeprefix("_").removesuffix("PublicKey")
    size = getattr(key, "key_size", None)
    return kind if size is None else f"{kind} {size} bits"


def _app_info(certificate: x509.Certificate) -> dict[str, str] | None:
    info = extension.app_info(certificate)
    if info is None:
        return None
    names = ("app_id", "compose_hash", "instance_id", "device_id", "os_image_hash")
    return {name: getattr(info, name) for name in names}


def _known(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return extension.extensions(certificate).get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _read(reader: Callable[[], Value]) -> Value:
    try:
        value = reader()
    except Exception as error:
        # The library reads many parts of a certificate only when asked for them.
        return f"not readable: {_one_line(error)}"
    if isinstance(value, str):
        return _printable(value)
    return [_printable(text) for text in value] if isinstance(value, list) else value


def _one_line(error: Exception) -> str:
    return _printable(str(error).split("\n", 1)[0] or type(error).__name__)


def _printable(text: str) -> str:
    """Escape what a certificate's text could do to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
