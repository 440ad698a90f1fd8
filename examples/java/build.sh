#!/usr/bin/env bash
# Generates the code of the API and builds build/client with the packages of Debian, without Maven.
set -euo pipefail
cd "$(dirname "$0")"
jars=$(printf '/usr/share/java/%s.jar:' grpc-{api,context,core,netty,protobuf,protobuf-lite,stub} \
    netty-{buffer,codec,codec-http,codec-http2,common,handler,resolver,transport} \
    protobuf proto-google-common-protos guava perfmark-{api,impl} \
    opencensus-api geronimo-annotation-1.3-spec slf4j-nop)
rm -rf build
mkdir -p build/src build/classes
# ErrorInfo is newer than Debian's com.google.rpc, so it is generated here, too.
protoc -I ../../protos -I ../node qwen3vl/v1/vision.proto errors.proto \
    --java_out=build/src --plugin=protoc-gen-grpc="$(command -v grpc_java_plugin)" --grpc_out=build/src
javac -nowarn -cp "$jars" -d build/classes \
    Client.java build/src/qwen3vl/v1/*.java build/src/google/rpc/*.java
printf '#!/bin/sh\nexec java -cp "%s" Client "$@"\n' "$PWD/build/classes:$jars" >build/client
chmod +x build/client
