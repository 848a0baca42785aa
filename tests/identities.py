"""Identities for tests of the data plane: real snapshots from a KMS in memory, held by hand."""

from __future__ import annotations

import ssl
import time

from dstack_mesh.errors import IdentityUnavailable
from dstack_mesh.identity.snapshot import Snapshot, build_snapshot
from dstack_mesh.identity.tls import Credentials
from dstack_mesh.model import AppId
from dstack_mesh.sim.kms import Kms

APP_A = AppId("aa" * 20)
APP_B = AppId("bb" * 20)


def snapshot_of(
    kms: Kms,
    app_id: AppId,
    generation: int = 1,
    min_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> Snapshot:
    """Give what an identity store would publish for `app_id`."""
    issued = kms.issue(app_id)
    return build_snapshot(
        Credentials(issued.key_pem, issued.chain_pem, kms.root_pem),
        generation,
        lifetime=86_400.0,
        min_version=min_version,
        now=time.time(),
    )


class FakeIdentity:
    """Stands in for an `IdentityStore`: holds what the test puts there."""

    def __init__(self, snapshot: Snapshot | None) -> None:
        self.current = snapshot

    def require(self) -> Snapshot:
        if self.current is None:
            raise IdentityUnavailable("none was put there")
        return self.current
