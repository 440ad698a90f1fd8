#!/usr/bin/env bash
# Stands in for grpcurl, as far as examples/grpcurl/smoke.sh uses it: the same calls with `buf curl`.
set -euo pipefail
scheme=https options=(--protocol grpc) method= address=
while [ $# -gt 0 ]; do
    case $1 in
    -plaintext) scheme=http options+=(--http2-prior-knowledge) ;;
    -cacert) options+=(--cacert "$2") && shift ;;
    -H) options+=(--header "$2") && shift ;;
    -d) options+=(--data "$2-") && shift ;; # "@" reads standard input; buf calls it "@-"
    list) options+=(--list-services) ;;
    -*) echo "unknown option $1" >&2 && exit 2 ;;
    */*) method=/$1 ;;
    *) address=$1 ;;
    esac
    shift
done
exec buf curl "${options[@]}" "$scheme://$address$method"
