# The worker for CPUs. From the repository's root, with BuildKit:
#
#   docker build -f deploy/images/cpu.Dockerfile -t imagegpt-worker:0.1.0 .
#
# Bases are pinned by tag, since digests could not be looked up where this was
# written. Pin them where you build, and keep them in your build's settings:
#
#   docker buildx imagetools inspect rust:1.95.0-bookworm --format '{{.Manifest.Digest}}'
#   docker build --build-arg RUST=rust@sha256:… --build-arg PYTHON=python@sha256:… …
#
# Without a network, from a folder that vendor.sh made where there is one:
#
#   deploy/images/vendor.sh target/vendor
#   docker build --network none --build-context vendor=target/vendor …
ARG RUST=rust:1.95.0-bookworm
ARG PYTHON=python:3.11-slim-bookworm

# Empty; --build-context vendor=… takes its place.
FROM scratch AS vendor

# Dependencies alone, which change seldom: what cargo-chef does, by the two
# files that say it all and an empty program, so that nothing has to be
# installed and the same lines work offline.
FROM ${RUST} AS dependencies
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY deploy/images/cargo-build.sh deploy/images/
RUN --mount=type=bind,from=vendor,target=/vendor \
    sh deploy/images/cargo-build.sh dependencies

FROM dependencies AS program
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

# The final root: the program, ONNX Runtime, and the libraries that they are
# linked with, all of this distribution.
FROM program AS root
COPY --from=library /src/target/onnxruntime /onnxruntime
COPY deploy/images/rootfs.sh deploy/images/
RUN sh deploy/images/rootfs.sh /rootfs target/release/imagegpt /onnxruntime/libonnxruntime.so \
    && cp /onnxruntime/LICENSE /onnxruntime/ThirdPartyNotices.txt /rootfs/opt/onnxruntime/
# The model that is baked in at /model: a folder of the build context. Weights are
# compiled now, since a pod's root is read-only; what is compiled or published as
# ONNX is copied. A volume may lie over it, or IMAGEGPT_MODEL name another path.
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
# By number, so that runAsNonRoot can be checked.
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["/usr/bin/imagegpt"]
CMD ["serve"]
