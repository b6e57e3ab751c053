# The gateway's image: the locked dependencies, the project's wheel, and a user without rights.
#
#   docker build -t webhook-gateway .
#   docker run --rm -p 8080:8080 -v "$PWD/routes.yaml:/etc/gateway/routes.yaml:ro" \
#       -e GITHUB_WEBHOOK_SECRET -e GATEWAY_LOG=kafka://kafka:9092 webhook-gateway
#
# Secrets come at run time, as variables or files; none is needed to build.
ARG BASE=python:3.13-slim

# The build backend is pinned, with its hashes, in dev.txt; nothing else of this stage goes further.
FROM ${BASE} AS wheel
WORKDIR /src
RUN python -m venv /build
COPY requirements/dev.txt requirements/
RUN /build/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
    --require-hashes -r requirements/dev.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
RUN /build/bin/python -m pip wheel --quiet --disable-pip-version-check \
    --no-index --no-deps --no-build-isolation --wheel-dir /dist .

FROM ${BASE} AS venv
RUN python -m venv /opt/gateway
COPY requirements/run.txt requirements/
RUN /opt/gateway/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r requirements/run.txt
COPY --from=wheel /dist /dist
# What runs needs no installer, so neither does who breaks in.
RUN /opt/gateway/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps /dist/*.whl \
    && /opt/gateway/bin/python -m pip uninstall --quiet --yes pip

FROM ${BASE}
LABEL org.opencontainers.image.title="webhook-gateway" \
      org.opencontainers.image.description="The central webhook entrypoint of a company: verify, acknowledge once durable, route, retry" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=venv /opt/gateway /opt/gateway
RUN install -d -o 10001 -g 10001 /var/lib/gateway
ENV PATH=/opt/gateway/bin:$PATH \
    GATEWAY_RULES=/etc/gateway/routes.yaml \
    GATEWAY_ADMIN=127.0.0.1:9090
# A number, so that Kubernetes can see that it isn't root (runAsNonRoot).
USER 10001:10001
# Where the embedded log's file is (gateway.db), unless GATEWAY_LOG names another or Kafka.
WORKDIR /var/lib/gateway
VOLUME /var/lib/gateway
EXPOSE 8080
# A drain: requests and deliveries under way end, what is done is committed. Give it 30 s (docker stop -t 30).
STOPSIGNAL SIGTERM
# Set the admin address by GATEWAY_ADMIN rather than by --admin, so that this finds it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["/opt/gateway/bin/python", "-c", "import os, urllib.request as http; http.build_opener(http.ProxyHandler({})).open('http://' + os.environ['GATEWAY_ADMIN'] + '/livez', timeout=2)"]
ENTRYPOINT ["gateway"]
CMD ["run"]
