from __future__ import annotations

import dataclasses

import pytest

from dstack_mesh.settings import tree
from dstack_mesh.settings.rules import FIELDS
from dstack_mesh.settings.schema import BY_ENV, BY_KEY, SCHEMA, Setting


def _leaves() -> set[str]:
    sections = {
        "outbound": tree.OutboundSettings,
        "inbound": tree.InboundSettings,
        "admin": tree.AdminSettings,
        "dstack": tree.DstackSettings,
        "tls": tree.TlsSettings,
        "log": tree.LogSettings,
    }
    whole = {field.name for field in dataclasses.fields(tree.Settings)}
    below = {f"{s}.{f.name}" for s, kind in sections.items() for f in dataclasses.fields(kind)}
    return below | (whole - sections.keys())


def test_the_table_and_the_tree_have_the_same_keys() -> None:
    tables = {f"inbound.{name}" for name in FIELDS.values()}
    assert {setting.key for setting in SCHEMA} == _leaves() - tables
    assert tables < _leaves()


def test_no_key_variable_or_flag_is_there_twice() -> None:
    assert len(BY_KEY) == len(SCHEMA)
    assert len(BY_ENV) == sum(len(setting.env) for setting in SCHEMA)
    assert len({setting.flag for setting in SCHEMA}) == len(SCHEMA)


@pytest.mark.parametrize("setting", SCHEMA, ids=lambda setting: setting.key)
def test_every_default_is_read_and_its_text_reads_the_same(setting: Setting) -> None:
    if setting.default is None:
        assert setting.text(None) is None
        return
    value = setting.kind.read(setting.default)
    text = setting.text(value)
    assert text is not None
    assert setting.kind.read(text) == value


@pytest.mark.parametrize("setting", SCHEMA, ids=lambda setting: setting.key)
def test_an_empty_value_is_an_error_everywhere(setting: Setting) -> None:
    with pytest.raises(ValueError):
        setting.kind.read("")


def test_the_contracts_names() -> None:
    flags = {setting.flag for setting in SCHEMA}
    assert {"--outbound-listen", "--backend", "--gateway", "--agent-address"} <= flags
    assert BY_ENV["DSTACK_AGENT_ADDRESS"].key == "dstack.agent"
    assert BY_KEY["inbound.backend"].env == ("MESH_BACKEND", "DSTACK_MESH_BACKEND")
    assert BY_KEY["dstack.gateway_domain"].env == ("MESH_GATEWAY", "DSTACK_GATEWAY_DOMAIN")


def test_off_is_written_as_off() -> None:
    listen = BY_KEY["admin.listen"]
    assert listen.text(listen.kind.read("off")) == "off"


def test_what_restricts_is_what_would_be_open_to_all_by_default() -> None:
    restricting = {setting.key: setting.default for setting in SCHEMA if setting.restricts}
    assert restricting == {"inbound.allow": "any", "outbound.agent": "all"}


def test_nginx_modes_names() -> None:
    assert BY_ENV["MESH_AUTH_LISTEN"].key == "inbound.auth_listen"
    assert BY_KEY["inbound.server_name"].env == ("MESH_SERVER_NAME", "DSTACK_MESH_SERVER_NAME")
    assert BY_KEY["inbound.mode"].kind.words == ("embedded", "nginx", "off")
