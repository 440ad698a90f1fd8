"""An image becomes a typed answer, from Python: three calls, and an error that can be read.

python client.py IMAGE [HOST:PORT]

QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key.
"""

import json
import os
import sys
from pathlib import Path

from qwen3vl import CallError, Client
from qwen3vl.v1 import vision_pb2 as pb

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["objects"],
    "properties": {"objects": {"type": "array", "items": {"type": "string"}, "maxItems": 8}},
}
TASK = pb.Task(
    inline=pb.InlineTask(
        user="List the objects in the image.",
        grammar=pb.Grammar(json_schema=json.dumps(SCHEMA)),
    )
)


def main(data: bytes, client: Client) -> None:
    image = pb.Image(data=data)

    found = client.analyze_image(pb.AnalyzeImageRequest(images=[image]))
    print(f"AnalyzeImage: {found.analysis.scene}; objects: {list(found.analysis.objects)}")

    result = client.run_task(pb.RunTaskRequest(task=TASK, images=[image])).result
    print(f"RunTask: {json.loads(result.json)}")
    print(f"  {result.usage.output_tokens} tokens from {result.model}")

    print("StreamTask: ", end="")
    for event in client.stream_task(pb.StreamTaskRequest(task=TASK, images=[image])):
        print(event.delta, end="", flush=True)  # provisional until the result has arrived
    print()

    too_hot = pb.SamplingOptions(temperature=3)
    try:
        client.run_task(pb.RunTaskRequest(task=TASK, sampling=too_hot))
    except CallError as error:
        print(f"An error: {error}")


if __name__ == "__main__":
    path, address = (*sys.argv[1:], "localhost:50051")[:2]
    ca, key = os.environ.get("QWEN3VL_CA"), os.environ.get("QWEN3VL_API_KEY")
    with Client(address, ca=ca, api_key=key, timeout_s=60) as client:
        try:
            main(Path(path).read_bytes(), client)
        except CallError as error:
            sys.exit(str(error))
