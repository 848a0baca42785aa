from __future__ import annotations

import re
from http import HTTPStatus

import pytest

from dstack_mesh import errors
from dstack_mesh.errors import MeshError

# The contract's table, code by code.
TABLE = {
    "bad_request": 400,
    "bad_target": 400,
    "header_too_large": 431,
    "uri_too_long": 414,
    "policy_denied": 403,
    "client_cert_required": 401,
    "client_cert_untrusted": 401,
    "peer_untrusted": 502,
    "peer_app_id_mismatch": 502,
    "peer_rejected_us": 502,
    "tls_failed": 502,
    "connect_failed": 502,
    "upstream_protocol_error": 502,
    "upstream_closed": 502,
    "connect_timeout": 504,
    "response_timeout": 504,
    "identity_unavailable": 503,
    "gateway_unknown": 503,
    "agent_unavailable": 502,
    "agent_denied": 403,
    "overloaded": 503,
}

CLASSES = [
    one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, MeshError) and one is not MeshError
]


def test_each_code_of_the_contract_has_one_class_with_its_status() -> None:
    assert len({one.code for one in CLASSES}) == len(CLASSES)
    assert {one.code: one.status for one in CLASSES} == TABLE


@pytest.mark.parametrize("error", CLASSES, ids=lambda one: one.code)
def test_a_class_is_named_after_its_code(error: type[MeshError]) -> None:
    words = re.findall("[A-Z][a-z]*", error.__name__)
    assert "_".join(words).lower() == error.code


@pytest.mark.parametrize("error", CLASSES, ids=lambda one: one.code)
def test_status_and_title_can_be_sent(error: type[MeshError]) -> None:
    assert 400 <= HTTPStatus(error.status) < 600
    assert error.title
    assert error.title.isascii()
    assert re.fullmatch("[a-z_]+", error.code), "the code is a header's value"


def test_titles_tell_the_errors_apart() -> None:
    assert len({one.title for one in CLASSES}) == len(CLASSES)


def test_only_what_passes_by_itself_asks_to_come_again() -> None:
    waits = {one.code: one.retry_after for one in CLASSES if one.retry_after is not None}
    assert set(waits) == {"identity_unavailable", "gateway_unknown", "overloaded"}
    assert all(isinstance(seconds, int) and seconds > 0 for seconds in waits.values())


def test_the_detail_is_kept_and_shown() -> None:
    error = errors.BadTarget("x-dstack-target-port is '0'")
    assert error.detail == "x-dstack-target-port is '0'"
    assert str(error) == error.detail
    with pytest.raises(MeshError):
        raise error
