# syntax=docker/dockerfile:1
# Two images from one recipe: `docker build --target cpu .` and `docker build --target gpu .`. Each is a slim Python with
# one virtual environment; compilers, pip's cache and the source tree stay in the builder. The base image is pinned by
# version; pin it by digest (python:...@sha256:...) where your registry can be asked for one.
FROM python:3.12.11-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/giantleap/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/giantleap
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY giantleap giantleap
COPY clients/python/giantleap_client giantleap_client
COPY bundles bundles
COPY export export
COPY models models
COPY service service
COPY training training

FROM builder AS builder-cpu
# The extra index holds torch builds without CUDA; everything else comes from PyPI.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Versions are bounded in pyproject.toml.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip pip install ".[cpu,otel,provenance]"

FROM builder AS builder-gpu
# torch from PyPI brings its CUDA libraries; the host needs only the driver and the NVIDIA container toolkit.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache/pip pip install ".[gpu,otel,provenance]"

FROM python:3.12.11-slim-bookworm AS runtime
# The root file system may be read-only: what is written goes to /data (a volume) and /tmp (a tmpfs).
ENV PATH=/opt/giantleap/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    GIANTLEAP_HOST=0.0.0.0 \
    GIANTLEAP_DATA_DIR=/data
RUN groupadd --gid 10001 giantleap \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin giantleap \
 && install -d -o 10001 -g 10001 /data
WORKDIR /data
EXPOSE 8000 9100
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["giantleap"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=builder-cpu /opt/giantleap /opt/giantleap

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=builder-gpu /opt/giantleap /opt/giantleap
