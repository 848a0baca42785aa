"""Where our credentials come from: the guest agent, or files."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Protocol

from cryptography import x509

from dstack_mesh.identity import extension
from dstack_mesh.identity.extension import ExtensionError, ExtensionMissingError
from dstack_mesh.identity.tls import Credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_MAX_FILE_BYTES = 1024 * 1024

_PEM_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL
)

LOCAL_KEY_PROVIDER = (
    "this machine's keys come from a local key provider: its certificate carries no app-id, so it "
    "can't be a member of a mesh. Deploy the app to a CVM whose keys come from a KMS "
    '("kms_enabled": true in app-compose.json); for development, `dstack-mesh sim` has a KMS'
)


class SourceError(Exception):
    """There are no credentials to be had now; `detail` says why. Asking again may help."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class CredentialSource(Protocol):
    """Gives credentials; `identity.store` decides when, and whether they are good."""

    @property
    def description(self) -> str:
        """What this is, for logs and errors: `guest agent unix:/var/run/dstack.sock`."""
        ...

    async def fetch(self) -> Credentials:
        """Return credentials; raises `SourceError`."""
        ...


class TlsKeyIssuer(Protocol):
    """What `AgentSource` needs of the guest agent's client."""

    async def get_tls_key(self, *, subject: str, not_after: int) -> tuple[str, Sequence[str]]:
        """Return a new key (PEM) and its chain (PEM, leaf first); raises `SourceError`."""
        ...


class AgentSource:
    """Credentials from the guest agent: a new key and leaf each time, in memory only.

    `lifetime_seconds` is what the agent is asked for; older agents give ten years whatever is
    asked. `subject` is the leaf's CN, which means nothing to a peer.
    """

    def __init__(
        self,
        agent: TlsKeyIssuer,
        lifetime_seconds: float,
        subject: str = "dstack-mesh",
        *,
        description: str = "the guest agent",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.description = description
        self._agent = agent
        self._lifetime = lifetime_seconds
        self._subject = subject
        self._clock = clock

    async def fetch(self) -> Credentials:
        """Ask the agent for a key; raises `SourceError`, also for a machine without app-id."""
        not_after = int(self._clock() + self._lifetime)
        key, chain = await self._agent.get_tls_key(subject=self._subject, not_after=not_after)
        pems = certificates("".join(f"{pem}\n" for pem in chain).encode())
        if not pems:
            raise SourceError("the guest agent's answer has no certificate in it")
        _require_app_id(pems[0])
        if len(pems) == 1:
            raise SourceError(
                "the guest agent's chain is its leaf alone: expected leaf, app CA and KMS root"
            )
        return Credentials(key.encode(), pems, pems[-1])


class FileSource:
    """Credentials from three PEM files: `cert_file` leaf and app CA, `ca_file` the KMS root."""

    def __init__(self, cert_file: Path, key_file: Path, ca_file: Path) -> None:
        self.description = f"the files {cert_file}, {key_file} and {ca_file}"
        self._cert_file = cert_file
        self._key_file = key_file
        self._ca_file = ca_file
        self._seen: tuple[object, ...] = ()

    async def fetch(self) -> Credentials:
        """Read the files; raises `SourceError` naming the one that does not serve."""
        self._seen = self._state()
        chain = certificates(_read(self._cert_file))
        if not chain:
            raise SourceError(
                f"{self._cert_file} has no PEM certificate: put leaf and app CA there"
            )
        roots = certificates(_read(self._ca_file))
        if len(roots) != 1:
            raise SourceError(
                f"{self._ca_file} has {len(roots)} PEM certificates, expected one: the KMS root"
            )
        return Credentials(_read(self._key_file), chain, roots[0])

    def changed(self) -> bool:
        """Tell whether a file is another than at the last `fetch`; costs three `stat` calls."""
        return self._state() != self._seen

    def _state(self) -> tuple[object, ...]:
        return tuple(
            _fingerprint(path) for path in (self._cert_file, self._key_file, self._ca_file)
        )


def certificates(pem: bytes) -> tuple[bytes, ...]:
    """Return the PEM certificates in `pem`, in order, each ending in a newline."""
    return tuple(block + b"\n" for block in _PEM_CERTIFICATE.findall(pem))


def _require_app_id(leaf_pem: bytes) -> None:
    """Tell the user of a machine that can't be a member, in words that name the cause."""
    try:
        extension.app_id(x509.load_pem_x509_certificate(leaf_pem))
    except ExtensionMissingError:
        raise SourceError(LOCAL_KEY_PROVIDER) from None
    except ExtensionError as exc:
        raise SourceError(f"the guest agent's leaf: {exc}") from exc
    except ValueError as exc:
        raise SourceError(f"the guest agent's leaf cannot be parsed: {exc}") from exc


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would block the event loop
            raise SourceError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise SourceError(f"cannot read {path}: {exc.strerror}") from exc
    if len(content) > _MAX_FILE_BYTES:
        raise SourceError(f"{path} is over {_MAX_FILE_BYTES} bytes, which no PEM file here is")
    return content


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
