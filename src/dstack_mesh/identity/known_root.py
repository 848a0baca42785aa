"""The KMS root key that a mesh has known since its start."""

from __future__ import annotations


class KnownRoot:
    """Remembers the SHA-256 of the first root key, for one process; see `workers.ledger`."""

    def __init__(self) -> None:
        self._digest = b""

    def digest(self) -> bytes:
        """Give it; empty while none is known."""
        return self._digest

    def learn(self, digest: bytes) -> None:
        """Take it for known, where none is yet."""
        self._digest = self._digest or digest
