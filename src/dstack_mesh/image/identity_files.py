"""Our identity as files for nginx: a generation is written whole, then switched to in one step.

`current` is a symbolic link to the generation in use. nginx resolves it once for each handshake
(see `nginx_template`), so key and certificate are always of one generation, and a renewal touches
no connection: nothing is reloaded for it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.image.layout import Owner

if TYPE_CHECKING:
    from dstack_mesh.identity.tls import Credentials


class IdentityFiles:
    """The generations in `directory`, which is in memory; `reader` is who may read the keys."""

    def __init__(self, directory: Path, reader: Owner | None) -> None:
        self.directory = directory
        self._reader = reader
        self._number = 0
        self._root_pem: bytes | None = None

    @property
    def current(self) -> Path:
        """The link to `cert.pem` and `key.pem` of the generation in use."""
        return self.directory / "current"

    @property
    def ca_file(self) -> Path:
        """The KMS root, the same file for all generations."""
        return self.directory / "ca.pem"

    def switch(self, credentials: Credentials) -> bool:
        """Write `credentials`, which were found good, and switch to them.

        Give True where the root's certificate is another than before: nginx reads that one only
        when it is reloaded. The last generation but one is removed, the last one stays for a
        handshake that is reading it. Raises OSError; the generation in use is the old one then.
        """
        number = self._number + 1
        new = self.directory / str(number)
        shutil.rmtree(new, ignore_errors=True)  # of an attempt that failed half-way
        new.mkdir(mode=0o700)
        self._give(new, 0o750)
        own = [pem for pem in credentials.chain_pem if pem != credentials.root_pem]
        self._write(new / "cert.pem", b"".join(own), 0o640)
        self._write(new / "key.pem", credentials.key_pem, 0o600)
        another_root = credentials.root_pem != self._root_pem
        if another_root:
            self._replace(self.ca_file, credentials.root_pem)
        draft = self.directory / "next"
        draft.unlink(missing_ok=True)
        draft.symlink_to(new.name)
        draft.replace(self.current)
        self._number, self._root_pem = number, credentials.root_pem
        shutil.rmtree(self.directory / str(number - 2), ignore_errors=True)
        return another_root

    def _replace(self, path: Path, content: bytes) -> None:
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        self._write(draft, content, 0o640)
        draft.replace(path)

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, mode)
            if self._reader is not None:
                os.fchown(descriptor, self._reader.uid, self._reader.gid)

    def _give(self, directory: Path, mode: int) -> None:
        directory.chmod(mode)
        if self._reader is not None:
            os.chown(directory, -1, self._reader.gid)
