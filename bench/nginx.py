"""nginx as the thing to be measured against, and as the TLS origin for both."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.sidecar import Process


def find() -> str | None:
    return shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(directory: Path, servers: str) -> Iterator[Process]:
    """Run one nginx worker with these `http` contents until the block ends."""
    program = find()
    assert program is not None, "install nginx-light"
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "nginx.conf"
    config.write_text(
        f"""daemon off; master_process on; worker_processes 1; pid {directory}/pid;
error_log {directory}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout 300s;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  {servers}
}}
"""
    )
    process = subprocess.Popen([program, "-c", str(config), "-p", str(directory)])
    try:
        yield Process(_workers(process), {}, 0.0)
    finally:
        process.terminate()
        process.wait(10)


def _workers(master: subprocess.Popen[bytes]) -> list[int]:
    """Wait for the worker process; the master does nothing while requests run."""
    children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
    end = time.monotonic() + 5
    while time.monotonic() < end:
        pids = [int(pid) for pid in children.read_text().split()]
        if pids:
            return pids
        assert master.poll() is None, "nginx did not start"
        time.sleep(0.01)
    raise RuntimeError("nginx has no worker")


def origin(port: int, cert: Path, key: Path, root: Path) -> str:
    """A TLS server that asks for a certificate of the KMS and answers at once."""
    return f"""server {{
    listen 127.0.0.1:{port} ssl backlog=1024; ssl_protocols TLSv1.3;
    ssl_certificate {cert}; ssl_certificate_key {key};
    ssl_client_certificate {root}; ssl_verify_client on; ssl_verify_depth 3;
    location / {{ default_type text/plain; return 200 ok; }}
  }}"""


def client_proxy(port: int, origin_port: int, cert: Path, key: Path, root: Path) -> str:
    """What nginx can do of the mesh's work: mTLS to one origin, its chain verified, kept alive."""
    return f"""upstream origin {{
    server 127.0.0.1:{origin_port}; keepalive 512; keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass https://origin; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $http_host; proxy_ssl_protocols TLSv1.3;
      proxy_ssl_certificate {cert}; proxy_ssl_certificate_key {key};
      proxy_ssl_trusted_certificate {root}; proxy_ssl_verify on; proxy_ssl_verify_depth 3;
      proxy_ssl_name localhost; proxy_ssl_server_name on; proxy_buffering off;
    }}
  }}"""
