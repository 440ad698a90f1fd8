#!/usr/bin/env bash
# Calls every kind of method with grpcurl. It needs no proto files: the server offers reflection.
#
#   ./smoke.sh IMAGE [HOST:PORT]
#
# QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key.
set -euo pipefail
image=$(base64 <"$1" | tr -d '\n')
address=${2:-localhost:50051}
options=()
if [ -n "${QWEN3VL_CA:-}" ]; then options+=(-cacert "$QWEN3VL_CA"); else options+=(-plaintext); fi
if [ -n "${QWEN3VL_API_KEY:-}" ]; then options+=(-H "authorization: Bearer $QWEN3VL_API_KEY"); fi

call() { # METHOD, the request as JSON on standard input: an image is too long for an argument
    echo "$1:"
    grpcurl "${options[@]}" -d @ "$address" "qwen3vl.v1.VisionService/$1"
}

grpcurl "${options[@]}" "$address" list

call GetModel <<<'{}'

call ValidateSchema <<'END'
{"grammar": {"json_schema": "{\"type\": \"integer\", \"multipleOf\": 5}"}}
END

call AnalyzeImage <<END
{"images": [{"data": "$image"}]}
END

call RunTask <<END
{"images": [{"data": "$image"}],
 "task": {"inline": {"user": "Is it day or night?", "grammar": {"choice": {"options": ["day", "night"]}}}}}
END

call StreamTask <<END
{"images": [{"data": "$image"}], "task": {"inline": {"user": "Where is this? Answer with one word."}}}
END

# A wrong request is an error with a reason.
if call RunTask <<<'{"task": {"inline": {"user": ""}}}'; then
    echo "An empty text was accepted." >&2
    exit 1
fi
