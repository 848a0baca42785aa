from __future__ import annotations

import dataclasses

import pytest

from dstack_mesh.settings.load import load_settings


def test_settings_cannot_be_changed() -> None:
    settings = load_settings({}, {}, None).settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.drain_timeout = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.inbound.mode = "off"  # type: ignore[misc]
