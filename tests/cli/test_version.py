from __future__ import annotations

import json
import platform
import ssl

import pytest

from dstack_mesh import __version__
from dstack_mesh.cli import main


def test_it_names_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    python = platform.python_version()
    expected = f"dstack-mesh {__version__} (Python {python}, {ssl.OPENSSL_VERSION})\n"
    assert capsys.readouterr().out == expected


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "version": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
    }
