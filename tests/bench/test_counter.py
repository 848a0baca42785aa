from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.counter import Counter, parse
from bench.wrk import FailedRequestsError, running

from bench import nginx
from tests.bench.test_pieces import needs

STATUS = b"""Active connections: 291
server accepts handled requests
 16630948 16630948 31070465
Reading: 6 Writing: 179 Waiting: 106
"""


def test_the_number_of_requests_is_read() -> None:
    assert parse(STATUS) == 31070465


def test_another_page_is_not_taken_for_one() -> None:
    with pytest.raises(ValueError, match="404"):
        parse(b"<h1>404 Not Found</h1>")


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[tuple[int, Counter]]:
    needs("nginx", "wrk")
    ports = nginx.free_port(), nginx.free_port()
    servers = (
        f"server {{ listen 127.0.0.1:{ports[0]}; location / {{ stub_status; }} }}"
        f"server {{ listen 127.0.0.1:{ports[1]}; location = / {{ return 200 ok; }} }}"
    )
    with nginx.running(tmp_path / "origin", servers):
        counter = Counter(ports[0])
        yield ports[1], counter
        counter.close()


def test_the_load_s_requests_are_counted_and_not_its_own(origin: tuple[int, Counter]) -> None:
    port, counter = origin
    assert counter.requests() == counter.requests() == 0

    with running(f"http://127.0.0.1:{port}/", connections=2):
        counter.wait_for(50)

    assert counter.requests() >= 50
    assert counter.requests() == counter.requests()


def test_a_load_whose_requests_fail_does_not_count(origin: tuple[int, Counter]) -> None:
    port, counter = origin

    with (
        pytest.raises(FailedRequestsError, match="Non-2xx"),
        running(f"http://127.0.0.1:{port}/missing", connections=2),
    ):
        counter.wait_for(50)
