# Image of the worker for CPUs. Build it from the repository's root, with BuildKit:
#
#   docker build -f deploy/images/cpu.Dockerfile -t imagegpt-worker:0.1.0 .
#
# The base images are pinned by tag, since digests could not be looked up when this
# was written. Pin them by digest in the settings of your build:
#
#   docker buildx imagetools inspect rust:1.95.0-bookworm --format '{{.Manifest.Digest}}'
#   docker build --build-arg RUST=rust@sha256:… --build-arg PYTHON=python@sha256:… …
#
# To build without a network, run vendor.sh on a machine with a network:
#
#   deploy/images/vendor.sh target/vendor
#   docker build --network none --build-context vendor=target/vendor …
ARG RUST=rust:1.95.0-bookworm
ARG PYTHON=python:3.11-slim-bookworm

# Empty; --build-context vendor=… replaces it.
FROM scratch AS vendor

# Only the dependencies, which change seldom, so that this layer is cached. Like
# cargo-chef, but with Cargo.toml, Cargo.lock and an empty program: no tool must be
# installed, and the same lines work offline.
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

FROM ${PYTHON} AS library
WORKDIR /src
COPY scripts/onnxruntime.sh scripts/
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=bind,from=vendor,target=/vendor \
    if [ -d /vendor/wheels ]; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/vendor/wheels; fi \
    && scripts/onnxruntime.sh

# The final root: the program, ONNX Runtime, and the libraries of this distribution
# that both are linked with.
FROM program AS root
COPY --from=library /src/target/onnxruntime /onnxruntime
COPY deploy/images/rootfs.sh deploy/images/
RUN sh deploy/images/rootfs.sh /rootfs target/release/imagegpt /onnxruntime/libonnxruntime.so \
    && cp /onnxruntime/LICENSE /onnxruntime/ThirdPartyNotices.txt /rootfs/opt/onnxruntime/
# The model at /model, from a directory of the build context. Weights are compiled
# now, since a pod's root is read-only; compiled directories and ONNX exports are
# copied. A volume may be mounted over /model, or IMAGEGPT_MODEL may name another
# path.
ARG MODEL=models/emoji
ARG PRECISION=int8
COPY ${MODEL} /source
RUN if [ -f /source/model.safetensors ] || [ -f /source/model.safetensors.index.json ] \
        || [ -f /source/pytorch_model.bin ]; then \
        target/release/imagegpt compile /source --precision "$PRECISION" --output /rootfs/model \
            --onnxruntime /onnxruntime/libonnxruntime.so; \
    else \
        cp -r /source/. /rootfs/model/; \
    fi

FROM scratch
COPY --from=root /rootfs /
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="imagegpt-worker" \
      org.opencontainers.image.description="A gRPC batch-processing worker that serves ImageGPT through ONNX Runtime, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV ORT_DYLIB_PATH=/opt/onnxruntime/libonnxruntime.so \
    IMAGEGPT_MODEL=/model \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
# A numeric user, because Kubernetes cannot check runAsNonRoot by name.
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["/usr/bin/imagegpt"]
CMD ["serve"]
