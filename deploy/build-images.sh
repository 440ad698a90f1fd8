#!/usr/bin/env bash
# Builds the images of the Dockerfile without Docker and without a registry, and tries them.
#
#   deploy/build-images.sh [cpu] [cuda]
#
# The base has the name of the official one (python:…-slim-bookworm) and is made of Debian packages. Each image is
# started as a cluster starts it: without root, with a read-only root file system and without a network. The script
# waits until the HEALTHCHECK of the image is healthy, has one drawing analysed, ends the container with SIGTERM and
# prints the sizes.
#
# Needs root, Linux on x86-64 and the Debian packages buildah, mmdebstrap, podman and crun or runc. Variables:
#   TORCH_INDEX  index that the cpu image takes torch from; default: PyTorch's own index of builds for the CPU
#   EXTRA_CA     PEM file with a CA to trust while building, for networks that inspect TLS
#   PODMAN_OPTIONS  such as "--runtime runc --cgroup-manager cgroupfs" on a machine without systemd
#   STORAGE      folder of the images; default: a temporary one, which is removed
#   SUITE        Debian release of the base; its Python is the one of the images
set -euo pipefail
cd "$(dirname "$0")/.."

SUITE=${SUITE:-bookworm}
PYTHON_VERSION=${PYTHON_VERSION:-3.11}
BASE=docker.io/library/python:$PYTHON_VERSION-slim-$SUITE
DRAWING=examples/drawings/samples/night-desert.png
HEALTHY_WITHIN_S=${HEALTHY_WITHIN_S:-300}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(cpu cuda)

if [ -z "${STORAGE:-}" ]; then
    STORAGE=$(mktemp -d)
    trap 'cleanup' EXIT
fi
cleanup() {
    buildah "${store[@]}" rmi --all --force > /dev/null 2>&1 || true
    rm -rf "$STORAGE"
}
store=(--root "$STORAGE/images" --runroot "$STORAGE/run")
# shellcheck disable=SC2206 # several words
podman=(podman --log-level fatal ${PODMAN_OPTIONS:-} "${store[@]}")
mkdir -p "$STORAGE"

make_base() {
    local hooks=() container
    if [ -n "${EXTRA_CA:-}" ]; then
        hooks=(
            --customize-hook="copy-in $EXTRA_CA /usr/local/share/ca-certificates"
            --customize-hook="mv \"\$1/usr/local/share/ca-certificates/$(basename "$EXTRA_CA")\" \"\$1/usr/local/share/ca-certificates/extra.crt\""
            --customize-hook="chroot \"\$1\" update-ca-certificates"
            --customize-hook="printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > \"\$1/etc/pip.conf\""
        )
    fi
    mmdebstrap --quiet --variant=minbase "${hooks[@]}" \
        --include=ca-certificates,python3,python3-venv,python-is-python3 "$SUITE" "$STORAGE/base.tar"
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add --quiet "$container" "$STORAGE/base.tar" / > /dev/null
    buildah "${store[@]}" config --cmd python3 "$container"
    buildah "${store[@]}" commit --quiet --rm "$container" "$BASE" > /dev/null
    rm "$STORAGE/base.tar"
}

build() {
    local arguments=(--build-arg "PYTHON_VERSION=$PYTHON_VERSION")
    [ -z "${TORCH_INDEX:-}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    # The format of Docker, because that of OCI has no HEALTHCHECK.
    buildah "${store[@]}" bud --format docker --isolation chroot --pull-never "${arguments[@]}" \
        --target "$1" --tag "qwen3vl:$1" .
}

try() {
    local name=qwen3vl-$1-$$ end=$((SECONDS + HEALTHY_WITHIN_S)) user
    "${podman[@]}" run --detach --name "$name" --read-only --read-only-tmpfs=false --network none \
        --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --health-interval disable \
        --cap-drop all --security-opt no-new-privileges \
        --env QWEN3VL_INSECURE=true --env QWEN3VL_DEVICE=cpu "qwen3vl:$1" > /dev/null
    until "${podman[@]}" healthcheck run "$name" > /dev/null 2>&1; do
        if [ $SECONDS -gt $end ] || [ "$("${podman[@]}" inspect --format '{{.State.Running}}' "$name")" != true ]; then
            "${podman[@]}" logs "$name" >&2
            echo "qwen3vl:$1 did not become healthy" >&2
            return 1
        fi
        sleep 1
    done
    user=$("${podman[@]}" exec "$name" python -c 'import os; print(os.getuid())')
    "${podman[@]}" exec --interactive "$name" qwen3vl analyze - < "$DRAWING"
    if "${podman[@]}" exec "$name" python -c 'open("/home/qwen3vl/file", "w")' 2> /dev/null; then
        echo "the root file system of qwen3vl:$1 is not read-only" >&2
        return 1
    fi
    echo "qwen3vl:$1: $("${podman[@]}" inspect --format '{{.State.Health.Status}}' "$name") as user $user, read-only root"
    "${podman[@]}" stop --time 40 "$name" > /dev/null
    echo "qwen3vl:$1: ended with exit code $("${podman[@]}" inspect --format '{{.State.ExitCode}}' "$name")"
    "${podman[@]}" rm "$name" > /dev/null
}

make_base
for target in "${targets[@]}"; do
    build "$target"
    try "$target"
done
"${podman[@]}" images --format '{{.Repository}}:{{.Tag}}  {{.Size}}'
