"""The errors that the mesh itself answers: one class for each code of the contract.

A handler raises one of these; the relay turns it into an `application/problem+json` answer
(RFC 9457) with the header `x-dstack-mesh-error: CODE`. `detail` is for the reader: what failed,
with which value, and what to do. It must never carry a key, a body or a credential.
"""

from __future__ import annotations

from typing import ClassVar


class MeshError(Exception):
    """A request that the mesh cannot or will not carry. Raised only as one of its subclasses."""

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    retry_after: ClassVar[int | None] = None
    """Seconds for the answer's `retry-after` (RFC 9110 10.2.3), or no such field."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class BadRequest(MeshError):
    """The request is not valid HTTP/1.1 or 1.0, or is ambiguous in its length."""

    code, status, title = "bad_request", 400, "Bad request"


class BadTarget(MeshError):
    """A target header is malformed, repeated with different values, or gives no valid host."""

    code, status, title = "bad_target", 400, "Bad mesh target"


class UriTooLong(MeshError):
    """The request target is over its limit."""

    code, status, title = "uri_too_long", 414, "Request target too long"


class HeaderTooLarge(MeshError):
    """The head has too many bytes or too many fields."""

    code, status, title = "header_too_large", 431, "Request header too large"


class ClientCertRequired(MeshError):
    """A caller from another CVM showed no certificate."""

    code, status, title = "client_cert_required", 401, "Client certificate required"


class ClientCertUntrusted(MeshError):
    """The caller's certificate breaks a chain rule."""

    code, status, title = "client_cert_untrusted", 401, "Client certificate not trusted"


class PolicyDenied(MeshError):
    """Policy does not let this caller, or this call, through."""

    code, status, title = "policy_denied", 403, "Denied by policy"


class AgentDenied(MeshError):
    """This guest agent call is not exposed to the application."""

    code, status, title = "agent_denied", 403, "Guest agent call not exposed"


class PeerUntrusted(MeshError):
    """The target's chain does not end at this KMS's root, or breaks a chain rule."""

    code, status, title = "peer_untrusted", 502, "Target not trusted"


class PeerAppIdMismatch(MeshError):
    """The target is a valid member of the mesh, but another app than the one asked for."""

    code, status, title = "peer_app_id_mismatch", 502, "Target is another app"


class PeerRejectedUs(MeshError):
    """The target's TLS refused this mesh's certificate."""

    code, status, title = "peer_rejected_us", 502, "Target refused our certificate"


class TlsFailed(MeshError):
    """No TLS session with the target came about."""

    code, status, title = "tls_failed", 502, "TLS with the target failed"


class ConnectFailed(MeshError):
    """No connection: name, route, refused or reset."""

    code, status, title = "connect_failed", 502, "Connection failed"


class UpstreamProtocolError(MeshError):
    """The answer is not valid HTTP/1.1 or 1.0, or has too many interim responses."""

    code, status, title = "upstream_protocol_error", 502, "Invalid upstream response"


class UpstreamClosed(MeshError):
    """The connection ended before a response began."""

    code, status, title = "upstream_closed", 502, "Upstream closed the connection"


class AgentUnavailable(MeshError):
    """The guest agent does not answer."""

    code, status, title = "agent_unavailable", 502, "Guest agent unavailable"


class IdentityUnavailable(MeshError):
    """There is no valid certificate of our own right now."""

    code, status, title = "identity_unavailable", 503, "No identity"
    retry_after = 1


class GatewayUnknown(MeshError):
    """The gateway's domain is not known (yet)."""

    code, status, title = "gateway_unknown", 503, "Gateway unknown"
    retry_after = 1


class Overloaded(MeshError):
    """A limit on connections is reached."""

    code, status, title = "overloaded", 503, "Overloaded"
    retry_after = 1


class ConnectTimeout(MeshError):
    """The time allowed for name, TCP and TLS together is over."""

    code, status, title = "connect_timeout", 504, "Connecting timed out"


class ResponseTimeout(MeshError):
    """The time allowed from the request's end to the response's first byte is over."""

    code, status, title = "response_timeout", 504, "Response timed out"
