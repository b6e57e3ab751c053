# The gateway's image: Python, the locked dependencies, the project, and a user without rights; no shell, no packages.
#
#   docker build -t webhook-gateway .
#   docker run --rm --read-only -p 8080:8080 -v "$PWD/routes.yaml:/etc/gateway/routes.yaml:ro" \
#       -e GITHUB_WEBHOOK_SECRET -e GATEWAY_LOG=kafka://kafka:9092 webhook-gateway
#
# Secrets come at run time, as variables or files; none is needed to build.
#
# The base is the newest of its version. For a build that can be repeated, name its digest, which
# `docker buildx imagetools inspect python:3.13-slim` tells: --build-arg BASE=python:3.13-slim@sha256:…
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
# What builds, and what is built, in an environment each: nothing of the first goes further.
COPY requirements/build.txt requirements/run.txt requirements/
RUN python3 -m venv /build \
    && /build/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
        --require-hashes --only-binary :all: -r requirements/build.txt \
    && python3 -m venv --without-pip /opt/gateway \
    && /build/bin/python -m pip --python /opt/gateway install --quiet --no-cache-dir --disable-pip-version-check \
        --require-hashes --only-binary :all: --no-compile -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY deploy/image deploy/image
RUN /build/bin/python -m pip wheel --quiet --disable-pip-version-check \
        --no-index --no-deps --no-build-isolation --wheel-dir /dist . \
    && /build/bin/python -m pip --python /opt/gateway install --quiet --disable-pip-version-check \
        --no-index --no-deps --no-compile /dist/*.whl \
    && /build/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
        --spec-version 1.6 --output-format JSON --output-file /bom.json /opt/gateway/bin/python \
    && /build/bin/python deploy/image/assemble.py --environment /opt/gateway --bom /bom.json /image

FROM scratch
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="webhook-gateway" \
      org.opencontainers.image.description="The central webhook entrypoint of a company: verify, acknowledge once durable, route, retry" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /image /
ENV PATH=/opt/gateway/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    GATEWAY_RULES=/etc/gateway/routes.yaml \
    GATEWAY_ADMIN=127.0.0.1:9090
# A number, so that Kubernetes can see that it isn't root (runAsNonRoot).
USER 10001:10001
# Where the embedded log's file is (gateway.db), unless GATEWAY_LOG names another or Kafka. Nothing else is written.
WORKDIR /var/lib/gateway
VOLUME /var/lib/gateway
EXPOSE 8080
# A drain: requests and deliveries under way end, what is done is committed. Give it 30 s (docker stop -t 30).
STOPSIGNAL SIGTERM
# Set the admin address by GATEWAY_ADMIN rather than by --admin, so that this finds it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["/opt/gateway/bin/python", "-m", "gateway.ops.probe", "/livez"]
ENTRYPOINT ["/opt/gateway/bin/gateway"]
CMD ["run"]
