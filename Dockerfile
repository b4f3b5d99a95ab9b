# syntax=docker/dockerfile:1
# Two targets from one recipe: `docker build --target cpu .` and `docker build --target gpu .`
FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin giantleap \
 && install -d -o giantleap -g giantleap /data
WORKDIR /app

FROM base AS cpu
# The extra index holds torch builds without CUDA; everything else comes from PyPI.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY . .
RUN pip install ".[cpu]"
USER giantleap
ENV GIANTLEAP_HOST=0.0.0.0 GIANTLEAP_DATA_DIR=/data
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["giantleap"]
CMD ["serve"]

FROM base AS gpu
# torch from PyPI brings its CUDA libraries; the host needs only the driver and the NVIDIA container toolkit.
COPY . .
RUN pip install ".[gpu]"
USER giantleap
ENV GIANTLEAP_HOST=0.0.0.0 GIANTLEAP_DATA_DIR=/data \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["giantleap"]
CMD ["serve"]
