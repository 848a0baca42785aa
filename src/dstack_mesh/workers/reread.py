"""The settings that a new worker has to start with, when they have been read again (SIGHUP)."""

from __future__ import annotations

from dstack_mesh import reload
from dstack_mesh.ops import logs
from dstack_mesh.settings.errors import SettingsError
from dstack_mesh.settings.load import Loaded
from dstack_mesh.settings.tree import Settings


class Reread:
    """What was started with, and what is in effect since the last reload.

    It is the workers that judge: what they refuse (a certificate that does not fit) is not adopted.
    """

    def __init__(self, started: Loaded) -> None:
        self.started = started
        self.current = started
        self._found: Loaded | None = None

    def look(self) -> None:
        """Read the settings anew, for `adopt`; a worker that does the same tells of mistakes."""
        try:
            self._found = self.current.again()
        except SettingsError:
            self._found = None

    def adopt(self) -> None:
        """Take what `look` found: it is in effect in a worker."""
        if self._found is not None:
            self.current, self._found = self._found, None
            logs.setup(self.current.settings.log.format, self.current.settings.log.level)

    def settings(self) -> Settings:
        """Give what is in effect, as one tree."""
        return reload.in_effect(self.started.settings, self.current.settings)
