"""A picture becomes a typed answer, from Python: three calls, and an error that can be read.

python client.py PICTURE [HOST:PORT]

QWEN3VL_CA=ca.pem turns TLS on, QWEN3VL_API_KEY=KEY sends a key. README.md says how the stubs below
(``qwen3vl.v1``) are generated.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from qwen3vl.v1 import vision_pb2 as pb
from qwen3vl.v1 import vision_pb2_grpc

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["objects"],
    "properties": {"objects": {"type": "array", "items": {"type": "string"}, "maxItems": 8}},
}
OPTIONS = [
    ("grpc.max_send_message_length", -1)
]  # the server's limit decides, and its error says so


def open_channel(address: str) -> grpc.aio.Channel:
    if ca := os.environ.get("QWEN3VL_CA"):
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes())
        return grpc.aio.secure_channel(address, credentials, OPTIONS)
    return grpc.aio.insecure_channel(address, OPTIONS)


def explain(error: grpc.aio.AioRpcError) -> str:
    """Status, reason and the fields that are wrong."""
    lines = [f"{error.code().name}: {error.details()}"]
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            lines.append(f"reason {info.reason}, request id {info.metadata['request_id']}")
        elif detail.Unpack(bad):
            lines += [f"{one.field} {one.description}" for one in bad.field_violations]
    return "\n  ".join(lines)


async def main(picture: bytes, address: str) -> None:
    key = os.environ.get("QWEN3VL_API_KEY")
    common = {
        "timeout": 60,  # seconds; the server stops working when the time is over
        "metadata": [("authorization", f"Bearer {key}")] if key else [],
    }
    image = pb.Image(data=picture)
    task = pb.Task(
        inline=pb.InlineTask(
            user="List the objects in the picture.",
            grammar=pb.Grammar(json_schema=json.dumps(SCHEMA)),
        )
    )
    async with open_channel(address) as channel:
        vision = vision_pb2_grpc.VisionServiceStub(channel)

        found = await vision.AnalyzeImage(pb.AnalyzeImageRequest(images=[image]), **common)
        print(f"AnalyzeImage: {found.analysis.scene}; objects: {list(found.analysis.objects)}")

        request = pb.RunTaskRequest(task=task, images=[image])
        answer = await vision.RunTask(request, **common)
        print(f"RunTask: {json.loads(answer.result.json)}")
        print(f"  {answer.result.usage.output_tokens} tokens from {answer.result.model}")

        print("StreamTask: ", end="")
        request = pb.StreamTaskRequest(task=task, images=[image])
        async for event in vision.StreamTask(request, **common):
            if event.WhichOneof("event") == "delta":  # provisional until the result is there
                print(event.delta, end="", flush=True)
        print()

        try:
            too_hot = pb.SamplingOptions(temperature=3)
            await vision.RunTask(pb.RunTaskRequest(task=task, sampling=too_hot), **common)
        except grpc.aio.AioRpcError as error:
            print(f"An error: {explain(error)}")


if __name__ == "__main__":
    try:
        asyncio.run(main(Path(sys.argv[1]).read_bytes(), (sys.argv[2:] or ["localhost:50051"])[0]))
    except grpc.aio.AioRpcError as error:
        sys.exit(explain(error))
