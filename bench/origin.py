"""What every subject of a race has behind it: the same nginx, and the same certificates.

Behind `/` is a small answer, behind `/16k`, `/1m`, `/100m` and `/512m` files of that size, behind
`/chunked` one of 16 KB in chunks, and behind `/sink` what reads uploads (`bench/sink.py`).
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import nginx
from bench.credentials import Authority, Files
from bench.process import running

SIZES = {"16k": 1 << 14, "1m": 1 << 20, "100m": 100_000_000, "512m": 512_000_000}
DOMAIN = "bench.test"


@dataclass(frozen=True)
class Origin:
    """A running origin; `tls` and the ports after it want the mesh's certificates."""

    directory: Path
    authority: Authority
    caller: Files
    target: Files
    plain: int
    tls: int
    once: int
    """Closes after each answer, and resumes no session."""

    resuming: int
    """Closes after each answer, and resumes sessions."""

    many: int
    """Is a different app for each of the names `{app-id}-443s.bench.test`."""

    status: int
    """Tells how many requests there were (`bench/counter.py`)."""

    app_ids: list[str]
    """The apps behind `many`."""


@contextlib.contextmanager
def origin(*, targets: int = 0) -> Iterator[Origin]:
    """Run it in a directory of its own until the block ends."""
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        directory = Path(name)
        authority = Authority(directory)
        plain, tls, once, resuming, many_port, status, sink_port = (
            nginx.free_port() for _ in range(7)
        )
        many = [authority.issue(f"target-{number}", DOMAIN) for number in range(targets)]
        made = Origin(
            directory,
            authority,
            authority.issue("a"),
            authority.issue("b"),
            plain,
            tls,
            once,
            resuming,
            many_port,
            status,
            [files.app_id for files in many],
        )
        _write_files(directory / "files")
        servers = _servers(made, many, sink_port)
        with _sink(sink_port), nginx.running(directory / "origin", servers, "load"):
            yield made


def _write_files(directory: Path) -> None:
    directory.mkdir()
    for name, size in SIZES.items():
        with (directory / name).open("wb") as file:
            file.truncate(size)  # zeros, which take no place on a disk
    (directory / "chunked").write_bytes(b"x" * SIZES["16k"])


@contextlib.contextmanager
def _sink(port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "bench.sink", str(port)]
    with running(command, "load", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the sink did not start"
        yield


def _servers(made: Origin, many: list[Files], sink_port: int) -> str:
    locations = f"""
    root {made.directory}/files; default_type text/plain; open_file_cache max=16;
    location = / {{ return 200 ok; }}
    location /orders/ {{ return 200 ok; }}
    location / {{ }}
    location = /chunked {{ ssi on; ssi_types *; }}
    location = /sink {{
      proxy_pass http://sink; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_request_buffering off; client_body_buffer_size 256k;
    }}"""
    target = _tls(made.target)
    servers = [
        f"upstream sink {{ server 127.0.0.1:{sink_port}; keepalive 64; }}",
        f"server {{ listen 127.0.0.1:{made.status}; location / {{ stub_status; }} }}",
        f"server {{ listen 127.0.0.1:{made.plain} backlog=1024; {locations} }}",
        f"server {{ listen 127.0.0.1:{made.tls} ssl backlog=1024; {target} {locations} }}",
        (
            f"server {{ listen 127.0.0.1:{made.once} ssl backlog=1024; {target}"
            f" keepalive_timeout 0; ssl_session_tickets off; {locations} }}"
        ),
        (
            f"server {{ listen 127.0.0.1:{made.resuming} ssl backlog=1024; {target}"
            f" keepalive_timeout 0; ssl_session_cache shared:resuming:1m; {locations} }}"
        ),
    ]
    servers += [
        f"server {{ listen 127.0.0.1:{made.many} ssl; {_tls(files)}"
        f" server_name {files.app_id}-443s.{DOMAIN}; {locations} }}"
        for files in many
    ]
    return "\n  ".join(servers)


def _tls(files: Files) -> str:
    return f"""ssl_protocols TLSv1.3;
    ssl_certificate {files.cert}; ssl_certificate_key {files.key};
    ssl_client_certificate {files.root}; ssl_verify_client on; ssl_verify_depth 3;"""
