ARG PYTHON=3.13-slim-trixie

FROM python:${PYTHON} AS build
# Extras of pyproject.toml, separated by commas. Traces are off until a variable names a collector.
ARG EXTRAS=otel
WORKDIR /src
COPY . .
# Nothing is compiled. The last step sees these wheels only, since a package of our name elsewhere is
# not ours. The constraints file pins the versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint scripts/constraints.txt setuptools \
    && pip wheel --no-cache-dir --no-build-isolation --only-binary :all: \
        --constraint scripts/constraints.txt --wheel-dir /wheels ./gen ".${EXTRAS:+[$EXTRAS]}" \
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
# Liveness only. The empty ProxyHandler ignores HTTP_PROXY, which must not be used for the loopback.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-I", "-c", "\
from os import environ as e; from urllib.request import ProxyHandler, build_opener; \
build_opener(ProxyHandler({})).open(f'http://127.0.0.1:{e.get(\"PORT\", 8080)}/health', timeout=4)"]
ENTRYPOINT ["productgraph"]
CMD ["serve"]
