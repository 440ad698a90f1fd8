# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target cpu  -t qwen3vl:cpu .    the reference engine alone, any machine; no CUDA, no LMDeploy
#   docker build --target cuda -t qwen3vl:cuda .   NVIDIA GPU (run with --gpus all)
#     docker run --gpus all … qwen3vl:cuda serve --engine lmdeploy --model Qwen/Qwen3-VL-8B-Instruct   (docs/gpu.md)
# The server refuses to listen beyond loopback without TLS and API keys: set QWEN3VL_TLS_CERT, QWEN3VL_TLS_KEY and
# QWEN3VL_API_KEYS_FILE, or QWEN3VL_INSECURE=true behind a gateway that does both.
# The health check asks the admin port, which is open to the container alone and speaks neither TLS nor mTLS. Give its
# number as the variable QWEN3VL_ADMIN_PORT, not as a flag; QWEN3VL_ADMIN_HOST=0.0.0.0 opens it to Prometheus and kubelet.
# The root file system may be read-only: docs/platforms.md.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-cpu
# On Linux, PyPI's torch is a CUDA build of several GB. This is PyTorch's own index of builds for the CPU; their
# versions end in +cpu, which the pins allow and pip prefers.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The large packages first: this layer is rebuilt only when the pins change.
RUN pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" torch torchvision transformers
COPY pyproject.toml hatch_build.py README.md LICENSE ./
# Every dependency but LMDeploy, which brings CUDA and has no use without a GPU.
RUN python -c "import tomllib; found = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; print(*(one for one in found if not one.startswith('lmdeploy')), sep='\n')" > requirements.txt \
    && pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" -r requirements.txt
COPY service service
COPY lmdeploy_ext lmdeploy_ext
RUN pip install --no-deps .

FROM build AS build-cuda
COPY requirements.lock ./
RUN pip install --require-hashes -r requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY service service
COPY lmdeploy_ext lmdeploy_ext
RUN pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin qwen3vl
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 QWEN3VL_HOST=0.0.0.0 QWEN3VL_PORT=50051 QWEN3VL_ADMIN_PORT=9090
# Importing torchvision makes torch look for a folder that it can write to, and fail where the root is read-only.
# Nothing is compiled with Inductor: any folder that exists will do.
ENV TORCHINDUCTOR_CACHE_DIR=/tmp
USER 10001
WORKDIR /home/qwen3vl
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import http.client, os; page = http.client.HTTPConnection('127.0.0.1', int(os.environ['QWEN3VL_ADMIN_PORT']), timeout=4); page.request('GET', '/readyz'); raise SystemExit(page.getresponse().status != 200)"]
ENTRYPOINT ["qwen3vl"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
ENV QWEN3VL_DEVICE=cpu

FROM runtime AS cuda
COPY --from=build-cuda /opt/venv /opt/venv
# The CUDA libraries come with the wheels; the driver comes from the host through the NVIDIA container runtime.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Triton and TileLang, which LMDeploy uses, compile small launchers at run time.
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001
