"""The oracles of the whole proxy, against proxies with a fault in them."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz.targets import TARGETS

from dstack_mesh.model import PeerIdentity
from dstack_mesh.outbound import connect
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.wire import translate
from fuzz import script
from tests.fuzz.faults import Patch, fails, replaced


def test_a_request_sent_before_the_check_is_found(monkeypatch: Patch) -> None:
    def hasty(real: Any) -> Any:
        def verify(self: Any, snapshot: Any, upstream: Upstream) -> Any:
            upstream.transport.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return real(self, snapshot, upstream)

        return verify

    replaced(monkeypatch, connect.MeshConnector, "_verify", hasty)
    fails("outbound_proxy")


def test_another_app_that_is_taken_for_the_target_is_found(monkeypatch: Patch) -> None:
    def gullible(self: Any, snapshot: Any, upstream: Upstream) -> Any:
        return PeerIdentity(self._endpoint.app_id, 4e9)

    monkeypatch.setattr(connect.MeshConnector, "_identify", gullible)
    fails("outbound_proxy")


@pytest.mark.parametrize("name", ["outbound_proxy", "inbound_proxy"])
def test_a_connection_pooled_with_an_answer_too_many_is_found(
    monkeypatch: Patch, name: str
) -> None:
    def keep(self: Upstream, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.response_data(data)

    monkeypatch.setattr(Upstream, "data_received", keep)
    monkeypatch.setattr(
        translate.Response, "_end", lambda self, *, excess: setattr(self, "done", True)
    )
    run, _ = TARGETS[name].load()
    module = __import__(f"fuzz.{name}", fromlist=["_GET"])
    verify = script.scene(script.What.VERIFY)
    asks = script.scene(script.What.CLIENT_SENDS, 0, module._GET)
    answers = script.scene(script.What.SERVER_SENDS, 0, module._OK)
    with pytest.raises(AssertionError, match="used again with"):
        run(asks + verify + answers[:-2] + b"__HTTP/1.1 200 OK\r\n" + asks + answers)


def test_an_answer_to_anothers_request_is_found(monkeypatch: Patch) -> None:
    """An answer that is still to come is given to whoever asks next."""

    def attach(self: Exchange, upstream: Upstream) -> None:
        real(self, upstream)
        upstream.lane.idle.append(upstream)

    real = Exchange._attach
    monkeypatch.setattr(Exchange, "_attach", attach)
    fails("inbound_proxy")


def test_a_callers_own_app_id_that_goes_on_is_found(monkeypatch: Patch) -> None:
    from dstack_mesh.inbound import terminator

    monkeypatch.setattr(terminator, "_REMOVE", frozenset((b"x-forwarded-for",)))
    fails("inbound_proxy")


def test_a_caller_without_an_identity_that_is_let_in_is_found(monkeypatch: Patch) -> None:
    from dstack_mesh.inbound import terminator

    monkeypatch.setattr(terminator.Caller, "_authorise", lambda self, policy, line, plan: None)
    fails("inbound_proxy")


def test_a_fault_inside_the_proxy_is_found(monkeypatch: Patch) -> None:
    def fault(*_: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(Lane, "take", fault)
    run, seeds = TARGETS["outbound_proxy"].load()
    with pytest.raises(KeyError):
        run(seeds[0])


def test_a_fault_inside_a_task_of_the_proxy_is_found(monkeypatch: Patch) -> None:
    def fault(*_: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(connect, "open_socket", fault)
    fails("outbound_proxy")


def test_a_broken_off_answer_that_looks_whole_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(translate.Response, "end", lambda self, clean: b"0\r\n\r\n")
    fails("inbound_proxy")
