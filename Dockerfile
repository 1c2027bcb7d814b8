ARG PYTHON=3.13-slim-trixie

FROM python:${PYTHON} AS build
# Extras of pyproject.toml, separated by commas. Traces are off until a variable names a collector.
ARG EXTRAS=otel
WORKDIR /src
# What others made, in a layer that lasts until these files change. Nothing is compiled, and the
# constraints file pins the versions.
COPY pyproject.toml ./
COPY gen/pyproject.toml gen/
COPY scripts/constraints.txt scripts/requirements scripts/
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint scripts/constraints.txt setuptools \
    && python scripts/requirements "$EXTRAS" > /requirements.txt \
    && pip wheel --no-cache-dir --only-binary :all: --constraint scripts/constraints.txt \
        --wheel-dir /wheels --requirement /requirements.txt
COPY . .
# The last step sees these wheels only, since a package of our name elsewhere is not ours.
# hadolint ignore=DL3013
RUN pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels ./gen . \
    && python -m venv --without-pip /app \
    && pip --python /app/bin/python install --no-cache-dir --no-index --find-links /wheels \
        productgraph-events "productgraph-ingestion${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ProductGraph event ingestion" \
      org.opencontainers.image.description="Takes telemetry events over HTTP and gRPC and stores them in PostgreSQL" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /app /app
# A container's loopback interface cannot be reached from outside: listen on all interfaces.
ENV PATH=/app/bin:$PATH \
    HOST=0.0.0.0
# By number: Kubernetes cannot tell from a name that the account is not root.
USER 10001:10001
EXPOSE 8080 50051 9464
STOPSIGNAL SIGTERM
# Liveness only. bash is there anyway, and speaks TCP: nothing has to be loaded for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["bash", "-c", "\
exec 3<>/dev/tcp/127.0.0.1/${PORT:-8080} || exit 1; \
printf 'GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3; \
read -r _ status _ <&3; [ \"$status\" = 200 ]"]
ENTRYPOINT ["productgraph"]
CMD ["serve"]
