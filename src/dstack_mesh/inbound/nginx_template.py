"""The text of the nginx configuration; `nginx_config` puts the values in for `@NAME@`."""

from __future__ import annotations

FILE = """\
# Made by `dstack-mesh nginx-config`: make it again rather than change it.

worker_processes auto;
error_log stderr warn;
@PID@
events {
    worker_connections 4096;
}

http {
    access_log off;
@TEMPORARY@
@HTTP_PART@}
"""

PROBLEM = """\
internal;
        default_type application/problem+json;
        add_header x-dstack-mesh-error @CODE@ always;
        return @STATUS@ '@BODY@\\n';"""

IDENTITY_MAP = """\
# The generation of the identity in use, resolved once for a handshake: `$realpath_root` alone would
# be resolved once more for the key, and could be another generation by then.
map $realpath_root $dstack_mesh_identity {
    default $realpath_root;
}
"""

BODY = """\
# An upgrade is asked for where `Connection` says so. HTTP/2 and TLS inside an upgraded connection
# would carry requests that neither the auth service nor any rule has seen.
map $http_connection $dstack_mesh_asked_for {
    "~*(?:^|,)[ ]*upgrade[ ]*(?:,|$)" $http_upgrade;
}
map $dstack_mesh_asked_for $dstack_mesh_upgrade {
    default $dstack_mesh_asked_for;
    "~*(?:^|,)[ ]*(?:h2|h3|http/|tls/)" "";
}
map $dstack_mesh_upgrade $dstack_mesh_connection {
    default upgrade;
    "" "";
}
# HTTP/1.0 may come without a Host; what goes on is HTTP/1.1, which may not.
map $http_host $dstack_mesh_host {
    default $http_host;
    "" "@BACKEND_HOST@";
}
map $http_x_request_id $dstack_mesh_request_id {
    default $request_id;
    "~^[A-Za-z0-9._:/+=@-]{1,200}$" $http_x_request_id;
}
map "$request_method $request_uri" $dstack_mesh_health {
    "~^(?:GET|HEAD) /health(?:[?]|$)" 1;
}
@IDENTITY_MAP@
upstream dstack_mesh_backend {
@BACKENDS@    keepalive 64;
}
upstream dstack_mesh_auth {
    server @AUTH@ max_fails=0;
    keepalive 64;
    keepalive_timeout @AUTH_IDLE@;
}

server {
    listen @LISTEN@;
    server_name @SERVER_NAME@;
@IDENTITY_ROOT@
    ssl_certificate "@CERT_FILE@";
    ssl_certificate_key "@KEY_FILE@";
    ssl_client_certificate "@CA_FILE@";
    # Leaf, app CA, root, and nothing more between them.
    ssl_verify_client optional;
    ssl_verify_depth 1;
    ssl_protocols @PROTOCOLS@;
    ssl_ciphers "@CIPHERS@";
    ssl_session_cache off;
    ssl_session_tickets off;

    # Names with `_` or anything but letters, digits and `-` are left out: a backend could take
    # them for the headers that are set below.
    underscores_in_headers off;
    ignore_invalid_headers on;

    server_tokens off;
    large_client_header_buffers 4 16k;
    client_header_timeout @HEAD_TIMEOUT@;
    client_body_timeout @IDLE_TIMEOUT@;
    client_max_body_size 0;
    keepalive_timeout @IDLE_TIMEOUT@;
    keepalive_requests 100000;
    send_timeout @STREAM_TIMEOUT@;
    tcp_nodelay on;

    error_page 400 405 411 497 501 505 = /.dstack-mesh/bad-request;
    error_page 414 = /.dstack-mesh/uri-too-long;
    error_page 494 = /.dstack-mesh/header-too-large;
    error_page 495 496 = /.dstack-mesh/untrusted;
    error_page 401 = @dstack_mesh_unauthorized;
    error_page 403 = @dstack_mesh_forbidden;
    error_page 500 503 = @dstack_mesh_no_auth;
    error_page 502 = @dstack_mesh_no_backend;
    error_page 504 = @dstack_mesh_backend_slow;

    location / {
        default_type "text/plain; charset=utf-8";
        if ($dstack_mesh_health) {
            return 200 "OK\\n";
        }
        auth_request /.dstack-mesh/auth;
        auth_request_set $dstack_mesh_app_id $upstream_http_x_dstack_app_id;
        auth_request_set $dstack_mesh_error $upstream_http_x_dstack_mesh_error;
        auth_request_set $dstack_mesh_problem $upstream_http_x_dstack_mesh_problem;

        proxy_pass http://dstack_mesh_backend;
        proxy_http_version 1.1;
        proxy_set_header Host $dstack_mesh_host;
        proxy_set_header Upgrade $dstack_mesh_upgrade;
        proxy_set_header Connection $dstack_mesh_connection;
        proxy_set_header x-dstack-app-id $dstack_mesh_app_id;
        proxy_set_header x-forwarded-for $proxy_add_x_forwarded_for;
        proxy_set_header x-forwarded-proto https;
        proxy_set_header x-real-ip $remote_addr;
        proxy_set_header x-client-cert "";
        proxy_set_header x-client-verify "";

        proxy_request_buffering off;
        proxy_buffering off;
        proxy_buffer_size 32k;
        proxy_buffers 4 32k;
        proxy_max_temp_file_size 0;
        proxy_connect_timeout @CONNECT_TIMEOUT@;
        proxy_read_timeout @STREAM_TIMEOUT@;
        proxy_send_timeout @STREAM_TIMEOUT@;
        proxy_socket_keepalive on;
        proxy_next_upstream error;

        # The response as it came, but for what would pass for an error of the mesh.
        proxy_hide_header x-dstack-mesh-error;
        proxy_pass_header Date;
        proxy_pass_header Server;
        proxy_redirect off;
        proxy_ignore_headers X-Accel-Redirect X-Accel-Buffering X-Accel-Charset
            X-Accel-Expires X-Accel-Limit-Rate;
    }

    location = /.dstack-mesh/auth {
        internal;
        proxy_pass http://dstack_mesh_auth/auth;
        proxy_http_version 1.1;
        # HEAD keeps the connection also behind a denial, whose body nginx does not read.
        proxy_method HEAD;
        proxy_pass_request_headers off;
        proxy_pass_request_body off;
        proxy_set_header Content-Length "";
        proxy_set_header Connection "";
        proxy_set_header Host dstack-mesh;
        proxy_set_header x-client-cert $ssl_client_escaped_cert;
        proxy_set_header x-client-verify $ssl_client_verify;
        proxy_set_header x-original-method $request_method;
        proxy_set_header x-original-uri $request_uri;
        proxy_set_header x-request-id $dstack_mesh_request_id;
        proxy_connect_timeout @CONNECT_TIMEOUT@;
        proxy_read_timeout @CONNECT_TIMEOUT@;
        proxy_next_upstream error;
    }

    location @dstack_mesh_unauthorized {
        default_type application/problem+json;
        add_header x-dstack-mesh-error $dstack_mesh_error always;
        return 401 "$dstack_mesh_problem\\n";
    }
    location @dstack_mesh_forbidden {
        default_type application/problem+json;
        add_header x-dstack-mesh-error $dstack_mesh_error always;
        return 403 "$dstack_mesh_problem\\n";
    }
    location = /.dstack-mesh/bad-request {
        @RETURN_BAD_REQUEST@
    }
    location = /.dstack-mesh/untrusted {
        @RETURN_UNTRUSTED@
    }
    location = /.dstack-mesh/uri-too-long {
        @RETURN_URI_TOO_LONG@
    }
    location = /.dstack-mesh/header-too-large {
        @RETURN_HEADER_TOO_LARGE@
    }
    location @dstack_mesh_no_auth {
        @RETURN_NO_AUTH@
    }
    location @dstack_mesh_no_backend {
        @RETURN_NO_BACKEND@
    }
    location @dstack_mesh_backend_slow {
        @RETURN_BACKEND_SLOW@
    }
}
"""
