# Two images of one file, without weights and without root:
#   docker build -t clip-pipeline .                        the job (the last stage)
#   docker build -t clip-pipeline-service --target service .   the service
# For NVIDIA GPUs add: --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg TORCH_INDEX=
# The base sets only what the driver needs: PyTorch's packages contain the CUDA libraries.
ARG BASE=debian:bookworm-slim
# PyTorch's CPU build has a fifth of the size of the CUDA build on the package index; an empty value installs the
# latter.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM ${BASE} AS python
ARG DEBIAN_FRONTEND=noninteractive
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
# Without versions: the base's index offers one version, and a pinned one disappears with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

FROM python AS dependencies
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tools \
    && python3 -m venv --without-pip /opt/venv
ARG TORCH_INDEX
ARG EXTRAS=onnx,int8,metrics,s3,deploy
WORKDIR /src
# Remove files that only PyTorch's tests read and, without CUDA, those of its compilers and a library: 416 MB.
COPY pyproject.toml constraints.txt jobs/deploy/requirements.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 requirements.py pyproject.toml "${EXTRAS}" > requirements.txt \
    && if [ -n "${TORCH_INDEX}" ]; then \
        /opt/tools/bin/pip --python /opt/venv/bin/python install --no-deps --index-url "${TORCH_INDEX}" \
            -c constraints.txt torch; \
    fi \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install -c constraints.txt -r requirements.txt \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/test \
    && if [ -n "${TORCH_INDEX}" ]; then \
        rm -rf /opt/venv/lib/python3*/site-packages/torch/include \
            /opt/venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so; \
    fi

FROM dependencies AS package
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY conf conf
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/tools/bin/pip install --no-deps --target /opt/clip-pipeline .

FROM python AS runtime
ARG DEBIAN_FRONTEND=noninteractive
ARG TORCH_INDEX
# Kernels for a GPU are compiled when a model is opened with torch.compile, int8 or fp8: with a C++ compiler and Python's
# headers, 294 MB on Ubuntu 24.04, and PyTorch's headers, 62 MB.
# hadolint ignore=DL3008
RUN if [ -z "${TORCH_INDEX}" ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends g++ python3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 clip \
    && useradd --uid 10001 --gid clip --no-create-home --home-dir /cache --shell /usr/sbin/nologin clip \
    && install -d -o clip -g clip /cache /work
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/clip-pipeline /opt/clip-pipeline
# Models, exports, compiled kernels and text embeddings are stored under /cache: mount a volume there. Kernels are loaded
# as libraries, which Docker forbids in a tmpfs such as /tmp of compose.yaml.
# The driver's libraries for video contain the JPEG engine of images.decoder=gpu; the base asks for compute and utility.
ENV PYTHONPATH=/opt/clip-pipeline \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    MPLCONFIGDIR=/tmp/matplotlib
USER 10001:10001
WORKDIR /work

FROM runtime AS service
COPY jobs/deploy/gunicorn.conf.py /etc/clip-pipeline/gunicorn.conf.py
# Loopback of a container is not reachable from outside. Publish the port when you start the container.
ENV SERVE_HOST=0.0.0.0 \
    SERVE_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
# The start loads the model and warms it up.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{int(os.environ['SERVE_PORT']) + 1}/readyz\", timeout=4)"]
CMD ["gunicorn", "-c", "/etc/clip-pipeline/gunicorn.conf.py"]

FROM runtime AS job
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m --retries=2 \
    CMD ["python", "-m", "pipeline.doctor", "--quick"]
ENTRYPOINT ["python", "-m", "pipeline"]
