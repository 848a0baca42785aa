"""Certificates of a KMS of this run, as files for every program that takes part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstack_mesh.model import AppId
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.world import app_id_of

CALLER, TARGET = app_id_of("a"), app_id_of("b")


@dataclass(frozen=True)
class Files:
    """One app's identity: chain (leaf and app CA), key, and both in one file for HAProxy."""

    app_id: AppId
    cert: Path
    key: Path
    root: Path
    both: Path

    def env(self) -> dict[str, str]:
        """Settings of a sidecar that has this identity, free ports and no backend."""
        return {
            "MESH_CERT_FILE": str(self.cert),
            "MESH_KEY_FILE": str(self.key),
            "MESH_CA_FILE": str(self.root),
            "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
            "MESH_ADMIN_LISTEN": "127.0.0.1:0",
        }


class Authority:
    """Issues identities into a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kms = Kms.create()
        self._root = directory / "root.pem"
        self._root.write_bytes(self._kms.root_pem)

    def issue(self, name: str, domain: str | None = None) -> Files:
        """Issue for the app that the simulator would name so; with its host name in `domain`.

        Only the peers need the name: the mesh goes by the app-id.
        """
        app_id = app_id_of(name)
        names = [] if domain is None else [f"{app_id}-443s.{domain}"]
        issued = self._kms.issue(app_id, alt_names=names)
        leaf, app_ca = issued.chain_pem[:2]
        files = Files(
            app_id,
            self._directory / f"{name}.pem",
            self._directory / f"{name}.key",
            self._root,
            self._directory / f"{name}.both",
        )
        files.cert.write_bytes(leaf + app_ca)
        files.key.write_bytes(issued.key_pem)
        files.both.write_bytes(leaf + app_ca + issued.key_pem)
        return files
