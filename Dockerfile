# The sidecar's image: docs/image.md says what is in it and why.
# Pin the base by its digest for a build that can be repeated: --build-arg BASE=debian@sha256:...
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
# Where pip looks is the builder's own affair: these are for this stage alone, and nothing of it but
# the installed packages goes into the image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The compiler makes C of what a request passes through (docs/adr/0007-compiled-data-plane.md); it
# stays in this stage.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends build-essential python3-dev python3-venv >/dev/null \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
RUN python3 -m venv /opt/dstack-mesh
# The dependencies change less often than the source: a layer of their own. They are installed before
# it is compiled, which goes by their types.
COPY constraints.txt pyproject.toml ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >needs.txt \
 && /opt/dstack-mesh/bin/pip wheel --quiet --no-cache-dir -c constraints.txt -w /wheels -r needs.txt \
 && /opt/dstack-mesh/bin/pip install --quiet --no-index --find-links /wheels -c constraints.txt -r needs.txt
COPY LICENSE README.md ./
COPY tools tools
COPY src src
RUN PIP_CONSTRAINT=/build/constraints.txt /opt/dstack-mesh/bin/pip wheel --quiet --no-cache-dir --no-deps -w /wheels . \
 && /opt/dstack-mesh/bin/pip install --quiet --no-index --find-links /wheels -c constraints.txt dstack-mesh \
 && /opt/dstack-mesh/bin/pip uninstall --quiet -y pip setuptools

FROM ${BASE}
LABEL org.opencontainers.image.title="dstack-mesh" \
      org.opencontainers.image.description="Service mesh sidecar for dstack: mutual TLS between confidential VMs, identity by app-id" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim"
# policy-rc.d: nothing is to be started while packages are installed. Nothing here needs setuid.
RUN printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d \
 && apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 nginx-light tini curl >/dev/null \
 && rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/*.log /var/log/apt \
    /usr/share/doc /usr/share/man /usr/share/locale /etc/nginx /var/www \
 && groupadd --system --gid 8091 mesh && useradd --system --uid 8091 --gid mesh --home-dir /nonexistent --shell /usr/sbin/nologin mesh \
 && groupadd --system --gid 8443 mesh-nginx && useradd --system --uid 8443 --gid mesh-nginx --home-dir /nonexistent --shell /usr/sbin/nologin mesh-nginx \
 && find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
COPY --from=build /opt/dstack-mesh /opt/dstack-mesh
RUN ln -s /opt/dstack-mesh/bin/dstack-mesh /usr/local/bin/dstack-mesh
ENV PYTHONUNBUFFERED=1
EXPOSE 80 443
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 CMD ["dstack-mesh", "await", "--timeout", "4"]
ENTRYPOINT ["tini", "--", "/opt/dstack-mesh/bin/python3", "-m", "dstack_mesh.image"]
# Last, since a change of an argument builds all anew that comes after it.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
