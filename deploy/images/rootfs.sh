#!/bin/sh
# Makes the root of an image that holds a program and what it needs, and nothing
# else: no shell, no package manager.
#
#   rootfs.sh ROOT PROGRAM [LIBRARY...]
#
# PROGRAM comes to /usr/bin, each LIBRARY to /opt/onnxruntime, and every shared
# library that any of them is linked with to where the loader looks for it. Run it
# on the distribution that they were built on.
# `make deploy-image` runs this here and serves a model from such a root.
set -eu
root=$1 program=$2
shift 2
mkdir -p "$root/usr/bin" "$root/opt/onnxruntime" "$root/etc/ssl/certs" "$root/tmp" "$root/model"
# Where a container gets what every container has; ONNX Runtime needs /proc.
mkdir -p "$root/proc" "$root/sys" "$root/dev"
# The layout of merged /usr, which the loader's path runs through.
mkdir -p "$root/usr/lib" "$root/usr/lib64"
for folder in lib lib64; do
    [ -e "$root/$folder" ] || ln -s "usr/$folder" "$root/$folder"
done
cp "$program" "$root/usr/bin/"
for library; do
    cp -L "$library" "$root/opt/onnxruntime/"
done
# The loader itself, and each library by the path that it was found at.
for object in "$program" "$@"; do
    ldd "$object" | awk '
        $2 == "=>" && $3 ~ /^\// { print $3 }
        $1 ~ /^\// { print $1 }'
done | sort -u | while read -r found; do
    mkdir -p "$root/$(dirname "$found")"
    cp -L "$found" "$root/$found"
done
# For downloads from the hub and https:// endpoints.
if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
fi
# Names for whoever looks; the image runs by number.
echo 'nonroot:x:65532:65532::/nonexistent:/none' >"$root/etc/passwd"
echo 'nonroot:x:65532:' >"$root/etc/group"
# The dataset client looks names up by the resolver of the C library.
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
chmod 1777 "$root/tmp"
