# The image of the coordinating centre: SuperLink, ServerApp, evaluator, administration.
#
# The first part is the same text in server.Dockerfile and client.Dockerfile, so that its layers
# are built once and lie on the disk once; a test compares them. Context: the repository's root.

ARG BASE_IMAGE=debian:bookworm-slim
ARG DEVICE=cpu

FROM ${BASE_IMAGE} AS base
RUN command -v python3 >/dev/null || { apt-get update -q \
        && apt-get install -q -y --no-install-recommends python3 \
        && apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log; }
RUN groupadd --gid 10001 fedqlora \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp fedqlora

# Names of packages only: an edit of pyproject.toml elsewhere leaves the cached layers below valid.
FROM base AS requirements
COPY docker/requirements.py pyproject.toml /
RUN python3 /requirements.py /pyproject.toml /requirements

FROM base AS dependencies
ARG DEVICE
COPY --from=requirements /requirements /requirements
COPY constraints.txt docker/constraints.cuda.txt docker/dependencies.sh /
COPY docker/wheelhouse/README.md docker/wheelhouse/${DEVICE}* /wheelhouse/${DEVICE}/
ARG PIP_INDEX_URL=
ARG TORCH_INDEX_URL=
ARG OFFLINE=
ARG EXTRAS=
RUN --mount=type=secret,id=ca_bundle --mount=type=cache,id=fedqlora-pip,target=/root/.cache/pip \
    sh /dependencies.sh runtime

FROM base AS runtime
COPY --from=dependencies /opt/fedqlora /opt/fedqlora
ENV PATH=/opt/fedqlora/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /app
ENTRYPOINT ["python", "-m"]

# End of the part that both Dockerfiles share.

FROM runtime AS code
# Mount points: a new named volume takes their owner and mode.
RUN install -d -o 10001 -g 10001 -m 0700 /certs /certs/superlink /certs/coordinator \
        /certs/evaluator /certs/root /state /held-out /run/evaluator /run/superexec \
    && install -d -o 10001 -g 10001 /runs /models /experiments
COPY pyproject.toml ./
COPY fedqlora fedqlora
COPY server server
COPY certs certs
COPY experiments experiments
# What the Flower app that the centre ships to the sites takes from the client.
COPY client/__init__.py client/app.py client/
# Only what lacks a mode is changed: a change writes the file into this layer once more.
RUN find . ! -perm -a=r -exec chmod a+rX {} + && python -m compileall -q .
ARG DEVICE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fedqlora-server" \
    org.opencontainers.image.description="SuperLink, ServerApp and evaluator of the coordinating centre" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.fedqlora.device="${DEVICE}"

# Development only: certificates, model and data of the demo, made by the service bootstrap.
FROM dependencies AS demo-dependencies
RUN --mount=type=secret,id=ca_bundle --mount=type=cache,id=fedqlora-pip,target=/root/.cache/pip \
    sh /dependencies.sh demo

FROM code AS demo
LABEL org.opencontainers.image.title="fedqlora-demo" \
    org.opencontainers.image.description="Development cluster: certificates, model and data of the demo"
COPY --from=demo-dependencies /opt/demo /opt/fedqlora
RUN ["/bin/bash", "-c", "install -d -o 10001 -g 10001 -m 0700 /deal /deal/{superlink,coordinator,evaluator,held-out,models,certs,root} /deal/sites /deal/sites/{a..z} /deal/sites/{a..z}/{supernode,trainer,data,policy,state}"]
COPY demo demo
# A site's first start, which a hospital's own image does there.
COPY client/ledger.py client/
RUN find demo client ! -perm -a=r -exec chmod a+rX {} + && python -m compileall -q demo client
USER 10001:10001

FROM code AS server
USER 10001:10001
