"""nginx as the thing to be measured against, and how it is told to do a sidecar's work."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cores import Role
from bench.credentials import Files
from bench.process import Process, eventually
from bench.process import running as program_running
from bench.tools import find as find_tool

_START_SECONDS = 10.0


def find() -> str | None:
    return find_tool("nginx")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    directory: Path, servers: str, role: Role = None, *, connections: int = 4096
) -> Iterator[Process]:
    """Run nginx with one worker and these `http` contents until the block ends."""
    program = find()
    assert program is not None, "install nginx-light"
    directory.mkdir(parents=True, exist_ok=True)
    config, pid = directory / "nginx.conf", directory / "pid"
    config.write_text(_file(directory, servers, connections))
    with program_running([program, "-c", str(config), "-p", str(directory)], role) as process:

        def has_worker() -> bool:
            if process.poll() is not None:
                log = (directory / "error.log").read_text(errors="replace")
                raise RuntimeError(f"nginx did not start: {log.strip()[-500:]}")
            return pid.exists() and len(Process([process.pid]).tree()) > 1

        eventually(has_worker, _START_SECONDS, "nginx has no worker")
        yield Process([process.pid])


def _file(directory: Path, servers: str, connections: int) -> str:
    # Started by root it would give its rights up, and the files here are the starter's alone.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    return f"""{user} daemon off; worker_processes 1; pid {directory}/pid;
worker_rlimit_nofile {2 * connections + 64};
error_log {directory}/error.log warn;
events {{ worker_connections {connections}; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout 600s; tcp_nodelay on;
  client_header_timeout 600s;
  client_max_body_size 0; server_names_hash_bucket_size 128; variables_hash_max_size 2048;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  {servers}
}}
"""


def origin(port: int, cert: Path, key: Path, root: Path) -> str:
    """A TLS server that asks for a certificate of the KMS and answers at once."""
    return f"""server {{
    listen 127.0.0.1:{port} ssl backlog=1024; ssl_protocols TLSv1.3;
    ssl_certificate {cert}; ssl_certificate_key {key};
    ssl_client_certificate {root}; ssl_verify_client on; ssl_verify_depth 3;
    location / {{ default_type text/plain; return 200 ok; }}
  }}"""


_UNTUNED = """proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header Host $http_host; proxy_buffering off; proxy_request_buffering off;"""
_STREAMING = f"""{_UNTUNED}
      proxy_buffer_size 32k; proxy_buffers 4 32k; client_body_buffer_size 64k;"""
"""What both of nginx's roles have in common with the mesh: bodies are streamed, `Host` stays.

Its buffers are those of `dstack-mesh nginx-config`. With the default ones nginx needs half as much
CPU again for large bodies, and as much for small ones.
"""


def client_proxy(port: int, origin_port: int, files: Files, *, tuned: bool = True) -> str:
    """What nginx can do of the mesh's work: mTLS to one origin, its chain verified, kept alive.

    `tuned`: with larger buffers than its own.
    """
    return f"""upstream origin {{
    server 127.0.0.1:{origin_port}; keepalive 512; keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass https://origin; {_STREAMING if tuned else _UNTUNED}
      {_proxy_tls(files, "localhost")}
    }}
  }}"""


def many_targets_proxy(
    port: int, origin_port: int, files: Files, app_ids: Sequence[str], domain: str
) -> str:
    """The same for many targets: nginx keeps connections by upstream, so each has its own."""
    upstreams = "\n  ".join(
        f"upstream to_{app_id} {{ server 127.0.0.1:{origin_port}; keepalive 32; }}"
        for app_id in app_ids
    )
    target = "${http_x_dstack_target_app}"
    return f"""{upstreams}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass https://to_{target}; {_STREAMING}
      {_proxy_tls(files, f"{target}-443s.{domain}")}
    }}
  }}"""


def _proxy_tls(files: Files, name: str) -> str:
    return f"""proxy_ssl_protocols TLSv1.3;
      proxy_ssl_certificate {files.cert}; proxy_ssl_certificate_key {files.key};
      proxy_ssl_trusted_certificate {files.root}; proxy_ssl_verify on; proxy_ssl_verify_depth 3;
      proxy_ssl_name {name}; proxy_ssl_server_name on;"""


def terminator(
    port: int, backend_port: int, files: Files, *, tickets: bool = True, tuned: bool = True
) -> str:
    """nginx as the server's side without any check of who calls: the chain is verified, no more."""
    return f"""upstream backend {{
    server 127.0.0.1:{backend_port}; keepalive 512; keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} ssl backlog=1024; ssl_protocols TLSv1.3;
    ssl_certificate {files.cert}; ssl_certificate_key {files.key};
    ssl_client_certificate {files.root}; ssl_verify_client on; ssl_verify_depth 3;
    ssl_session_tickets {"on" if tickets else "off"};
    location / {{
      proxy_pass http://backend; {_STREAMING if tuned else _UNTUNED}
      proxy_set_header x-forwarded-for $proxy_add_x_forwarded_for;
      proxy_set_header x-forwarded-proto https; proxy_set_header x-real-ip $remote_addr;
    }}
  }}"""


def server_part(command: Sequence[str], env: dict[str, str]) -> str:
    """Give what `dstack-mesh nginx-config --server` prints for these settings."""
    done = subprocess.run(
        [*command, "nginx-config", "--server"], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nginx-config: {done.stderr.strip()}")
    return done.stdout
