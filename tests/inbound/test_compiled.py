from __future__ import annotations

from pathlib import Path

import pytest
from tests.policy.cases import FRIEND, OWN, STRANGER, caller

from dstack_mesh.inbound.compiled import compile_inbound
from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.load import load_settings


@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_all_of_the_settings_counts(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(
        f"""
        [inbound]
        backend = "a:1"
        allow = ["self", "{FRIEND}"]
        policy_mode = "{mode}"
        [[inbound.rule]]
        action = "allow"
        methods = ["GET"]
        [[inbound.route]]
        host = "b"
        backend = "b:2"
        """
    )
    policy, routes = compile_inbound(load_settings({}, {}, file).settings.inbound)
    verdicts = {
        (app, method): policy.decide(caller(app), OWN, method, b"/").verdict
        for app in (OWN, STRANGER)
        for method in (b"GET", b"PUT")
    }
    no = "deny" if mode == "enforce" else "audit"
    assert verdicts == {
        (OWN, b"GET"): "allow",
        (OWN, b"PUT"): no,
        (STRANGER, b"GET"): no,
        (STRANGER, b"PUT"): no,
    }
    assert routes.choose(b"b", b"/") == TcpAddress("b", 2)
