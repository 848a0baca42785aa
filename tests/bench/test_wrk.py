from __future__ import annotations

import pytest
from bench.wrk import FailedRequestsError, parse

OUTPUT = """Running 10m test @ http://127.0.0.1:39555/16k
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.28ms    0.61ms   6.31ms   85.96%
    Req/Sec    20.35k     1.38k   23.10k    75.00%
  {requests} requests in 417.44ms, 1.11MB read
{more}Requests/sec:   9831.38
Transfer/sec:      2.66MB
"""


def test_requests_are_read() -> None:
    assert parse(OUTPUT.format(requests=4104, more="")) == 4104


@pytest.mark.parametrize(
    "more",
    [
        "  Non-2xx or 3xx responses: 1\n",
        "  Socket errors: connect 0, read 1, write 0, timeout 0\n",
    ],
)
def test_a_run_with_a_failed_request_does_not_count(more: str) -> None:
    with pytest.raises(FailedRequestsError, match=more.strip()[:10]):
        parse(OUTPUT.format(requests=4104, more=more))


@pytest.mark.parametrize("text", [OUTPUT.format(requests=0, more=""), "", "unable"])
def test_a_run_without_requests_does_not_count(text: str) -> None:
    with pytest.raises(FailedRequestsError):
        parse(text)
