"""How many requests the origin has had so far, by nginx's `stub_status`.

What a load generator counts includes how it begins and ends: connections are opened, and at the end
cut in the midst of requests, so that the subject has to replace its own to the target. With the
origin's count and the subject's CPU time read at the same two moments, only what lies between them
counts.
"""

from __future__ import annotations

import http.client
import re
import time

_NUMBERS = re.compile(rb"requests\s+\d+ \d+ (\d+)")
_START_SECONDS = 15.0


class Counter:
    """Asks one nginx, over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        self._own = 0

    def requests(self) -> int:
        """Give the requests so far, but for those of this counter."""
        self._own += 1
        self._connection.request("GET", "/")
        return parse(self._connection.getresponse().read()) - self._own

    def wait_for(self, more: int) -> None:
        """Wait for so many `more` requests. Raises `RuntimeError` when it takes long."""
        wanted = self.requests() + more
        end = time.monotonic() + _START_SECONDS
        while self.requests() < wanted:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"the origin got less than {more} requests in {_START_SECONDS} s"
                )
            time.sleep(0.01)

    def close(self) -> None:
        self._connection.close()


def parse(text: bytes) -> int:
    """Read the number of requests from what `stub_status` writes."""
    match = _NUMBERS.search(text)
    if match is None:
        raise ValueError(f"not from stub_status: {text[:100]!r}")
    return int(match[1])
