#!/usr/bin/env bash
# Shows that the contents of the image suffice: makes the same root directory as
# deploy/images/cpu.Dockerfile from the worker that was built here, and serves a
# model from it, read-only, without a shell and as user 65532. Needs root (for
# chroot and mounts) and the distribution of the image, Debian 12.
set -euo pipefail
cd "$(dirname "$0")/.."
root=target/deploy-image
grpc=${PORT:-50171} metrics=${METRICS_PORT:-9211}
rm -rf "$root"
sh deploy/images/rootfs.sh "$root" target/release/imagegpt target/onnxruntime/libonnxruntime.so
target/release/imagegpt compile models/emoji --precision int8 --output "$root/model" 2>/dev/null >/dev/null
echo "deploy-image.sh: $(find "$root" -type f | wc -l) files, $(du -sm "$root" | cut -f1) MB, shells: $(
    find "$root" -name '*sh' -path '*bin*' | wc -l)"
# A mount namespace of its own keeps the mounts out of this system.
unshare --mount bash -euc '
    mount --bind "$1" "$1"
    mount -o remount,ro,bind "$1"
    mount --rbind /proc "$1/proc"
    mount --rbind /dev "$1/dev"
    mount --rbind /sys "$1/sys"
    cd "$1"
    exec env -i ORT_DYLIB_PATH=/opt/onnxruntime/libonnxruntime.so IMAGEGPT_MODEL=/model \
        /usr/sbin/chroot --userspec=65532:65532 . /usr/bin/imagegpt serve \
        --listen "127.0.0.1:$2" --metrics-listen "127.0.0.1:$3"
' - "$root" "$grpc" "$metrics" 2>"$root.log" &
pid=$!
trap 'kill "$pid" 2>/dev/null || true' EXIT
scripts/await-ready.sh "$pid" "$metrics" "$root.log"
grep -q '^Uid:	65532' "/proc/$pid/status"
target/release/imagegpt neighbors models/pictures/animals-nature --alpha white --endpoint "http://127.0.0.1:$grpc" \
    | tail -4
kill "$pid"
wait "$pid"
trap - EXIT
echo "deploy-image.sh: served read-only as user 65532, and ended with 0 on SIGTERM"
