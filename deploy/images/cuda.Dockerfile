# Image of the worker for NVIDIA GPUs: like cpu.Dockerfile, with ONNX Runtime's
# CUDA 13 build and the CUDA libraries that it needs. The driver's libraries (580 or
# newer) come from the node. Build it from the repository's root, with BuildKit:
#
#   docker build -f deploy/images/cuda.Dockerfile -t imagegpt-worker-cuda:0.1.0 .
#
# cpu.Dockerfile explains how to pin the base images by digest, and how to build
# without a network (`deploy/images/vendor.sh target/vendor cuda`).
ARG RUST=rust:1.95.0-bookworm
ARG PYTHON=python:3.11-slim-bookworm

# Empty; --build-context vendor=… replaces it.
FROM scratch AS vendor

# Only the dependencies, which change seldom; see cpu.Dockerfile.
FROM ${RUST} AS dependencies
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY deploy/images/cargo-build.sh deploy/images/
RUN --mount=type=bind,from=vendor,target=/vendor \
    sh deploy/images/cargo-build.sh dependencies

FROM dependencies AS program
COPY web/dist web/dist
COPY src src
RUN --mount=type=bind,from=vendor,target=/vendor \
    sh deploy/images/cargo-build.sh

# Only the shared libraries of the wheels, 1 GB, all in one directory, because ONNX
# Runtime looks for its providers next to itself.
FROM ${PYTHON} AS library
WORKDIR /src
COPY deploy/images/cuda-requirements.txt ./
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=bind,from=vendor,target=/vendor \
    if [ -d /vendor/wheels ]; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/vendor/wheels; fi \
    && pip install --quiet --no-cache-dir --no-deps --only-binary=:all: --require-hashes --target /wheels \
        --requirement cuda-requirements.txt \
    && mkdir /onnxruntime \
    && mv /wheels/onnxruntime/capi/libonnxruntime.so.* /onnxruntime/libonnxruntime.so \
    && mv /wheels/onnxruntime/capi/libonnxruntime_providers_shared.so \
        /wheels/onnxruntime/capi/libonnxruntime_providers_cuda.so \
        /wheels/nvidia/cu13/lib/lib*.so.* \
        /wheels/onnxruntime/LICENSE /wheels/onnxruntime/ThirdPartyNotices.txt /onnxruntime/

FROM program AS root
COPY deploy/images/rootfs.sh deploy/images/
# ONNX Runtime is an argument so that the libraries that it is linked with are
# copied too; the CUDA provider is linked with the same system libraries.
COPY --from=library /onnxruntime/libonnxruntime.so /onnxruntime/
RUN sh deploy/images/rootfs.sh /rootfs target/release/imagegpt /onnxruntime/libonnxruntime.so
# The model at /model, copied unchanged: graphs for a GPU are compiled on a machine
# with a GPU (`imagegpt compile --provider cuda`, deploy/jobs/compile), and a build
# has none. The default is an ONNX export that runs anywhere.
ARG MODEL=models/untrained
COPY ${MODEL} /rootfs/model

FROM scratch
COPY --from=root /rootfs /
COPY --from=library /onnxruntime /opt/onnxruntime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="imagegpt-worker-cuda" \
      org.opencontainers.image.description="A gRPC batch-processing worker that serves ImageGPT through ONNX Runtime, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# LD_LIBRARY_PATH has Debian's library directories, because the container runtime
# puts the driver's libraries there, including libcuda.so.1.
ENV ORT_DYLIB_PATH=/opt/onnxruntime/libonnxruntime.so \
    LD_LIBRARY_PATH=/opt/onnxruntime:/usr/lib/x86_64-linux-gnu:/usr/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    IMAGEGPT_MODEL=/model \
    IMAGEGPT_EXECUTION_PROVIDER=cuda \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["/usr/bin/imagegpt"]
CMD ["serve"]
