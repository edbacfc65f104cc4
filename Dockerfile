# An image that runs every job, and as a node of a cluster (deploy/kuberay) a worker of it.
#
#   docker build --tag two-stream-i3d .                              on CPUs
#   docker build --tag two-stream-i3d:cuda --build-arg DEVICE=cuda .   with the PyTorch that carries CUDA's libraries
#
# BASE is a Debian whose `python` is one that constraints.txt was tested with.
ARG BASE=python:3.11.14-slim-bookworm
ARG DEVICE=cpu

FROM ${BASE} AS packages
ARG DEVICE
# PyPI's PyTorch for Linux is the one for CUDA, with 3 GB of NVIDIA's libraries.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt pyproject.toml ./
# Only what pyproject.toml asks for: a change of the code leaves this layer as it is.
RUN case "$DEVICE" in cpu|cuda) ;; *) echo "DEVICE is $DEVICE: give cpu or cuda" >&2; exit 1 ;; esac \
    && python -m venv /opt/venv \
    && if [ "$DEVICE" = cpu ]; then \
        /opt/venv/bin/pip install --no-deps --index-url "$CPU_INDEX" --constraint constraints.txt torch; \
    fi \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && /opt/venv/bin/pip install --constraint constraints.txt --requirement requirements.txt

FROM ${BASE}
ARG DEVICE
# By wget KubeRay asks a node whether it lives; with gcc Triton compiles what launches its kernels when they first run.
# hadolint ignore=DL3008,SC2046
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget $([ "$DEVICE" = cpu ] || echo gcc libc6-dev) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ray \
    && chmod 777 /home/ray
COPY --from=packages /opt/venv /opt/venv
COPY . /app
# USER, because PyTorch asks who it is and `docker run --user` may name somebody whom /etc/passwd does not know.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/home/ray USER=ray RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 1000
ENTRYPOINT ["python"]
CMD ["jobs/extract_flow.py", "--help"]
