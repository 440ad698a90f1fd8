#!/usr/bin/env bash
# Generates the code of the API and builds build/client with the packages of Debian, without Go modules.
set -euo pipefail
cd "$(dirname "$0")"
package=Mqwen3vl/v1/vision.proto=example.com/qwen3vlv1
mkdir -p build/src
protoc -I ../../protos qwen3vl/v1/vision.proto \
    --go_out=build/src --go_opt="$package" --go-grpc_out=build/src --go-grpc_opt="$package"
GO111MODULE=off GOPATH="$PWD/build:/usr/share/gocode" go build -o build/client client.go
