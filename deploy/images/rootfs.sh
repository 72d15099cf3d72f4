#!/bin/sh
# Makes the root file system of an image with a program and the files that it
# needs, and nothing else: no shell, no package manager.
#
#   rootfs.sh ROOT PROGRAM [LIBRARY...]
#
# Copies PROGRAM to /usr/bin, each LIBRARY to /opt/onnxruntime, and every shared
# library that any of them is linked with to the path where the loader looks for it.
# Run this script on the distribution on which they were built.
# `make deploy-image` runs it on this machine and serves a model from such a root.
set -eu
root=$1 program=$2
shift 2
mkdir -p "$root/usr/bin" "$root/opt/onnxruntime" "$root/etc/ssl/certs" "$root/tmp" "$root/model"
# Mount points of every container; ONNX Runtime needs /proc.
mkdir -p "$root/proc" "$root/sys" "$root/dev"
# The layout of a merged /usr, which the loader's path needs.
mkdir -p "$root/usr/lib" "$root/usr/lib64"
for folder in lib lib64; do
    [ -e "$root/$folder" ] || ln -s "usr/$folder" "$root/$folder"
done
cp "$program" "$root/usr/bin/"
for library; do
    cp -L "$library" "$root/opt/onnxruntime/"
done
# The loader itself, and each library at the path where it was found.
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
# Names of user and group, for tools that show them; the image runs by number.
echo 'nonroot:x:65532:65532::/nonexistent:/none' >"$root/etc/passwd"
echo 'nonroot:x:65532:' >"$root/etc/group"
# The dataset client resolves names with the C library.
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
chmod 1777 "$root/tmp"
