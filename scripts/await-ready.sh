#!/usr/bin/env bash
# usage: await-ready.sh PID METRICS_PORT LOG
# Waits until the worker PID is ready. If the worker ends first, prints its log.
set -euo pipefail
for _ in $(seq 600); do
    if ! kill -0 "$1" 2>/dev/null; then
        cat "$3" >&2
        exit 1
    fi
    if (exec 3<>"/dev/tcp/127.0.0.1/$2") 2>/dev/null; then
        exec 3<>"/dev/tcp/127.0.0.1/$2"
        printf 'GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n' >&3
        read -r answer <&3 || answer=
        exec 3>&-
        case $answer in *" 200 "*) exit 0 ;; esac
    fi
    sleep 0.1
done
echo "await-ready.sh: not ready after 60 s; see $3" >&2
exit 1
