# docker build -t pyengine .                        for CPUs
# docker build -t pyengine --build-arg TORCH=cu130 . for NVIDIA GPUs, with Triton's kernels
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:${PYTHON}-slim
ARG TORCH=cpu
COPY --from=build /wheels /wheels
# torch first: its default build on Linux is one of several gigabytes for GPUs.
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/${TORCH} \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)[serve,grammar]"
RUN useradd --create-home pyengine
USER pyengine
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
# Reachable from outside the container, so it asks for PYENGINE_API_KEY.
ENTRYPOINT ["pyengine", "serve", "--host", "0.0.0.0"]
