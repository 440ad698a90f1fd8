"""A client without stubs: everything it knows comes from the server.

Run as a program it stands in for grpcurl, as far as docs/clients.md uses it: ``list``, methods, ``-d``,
``-plaintext``, ``-cacert``, ``-H``. It imports nothing of the project.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

Entries = tuple[tuple[str, str], ...]


class ReflectionClient:
    """Finds services and builds messages by reflection; requests and answers are plain values."""

    def __init__(self, channel: grpc.Channel, metadata: Entries = ()) -> None:
        self.channel = _WithMetadata(channel, metadata) if metadata else channel
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def services(self) -> list[str]:
        return sorted(self.database.get_services())

    def methods(self, service: str) -> list[str]:
        return [method.name for method in self.pool.FindServiceByName(service).methods]

    def call(self, service: str, name: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """All messages of the answer; a unary method has one."""
        method = self.pool.FindServiceByName(service).FindMethodByName(name)
        message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
        kind = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        rpc = kind(
            f"/{service}/{name}",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        found = rpc(message, timeout=60)
        answers = list(found) if method.server_streaming else [found]
        return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answers]


class _WithMetadata:
    """A channel that sends the same metadata with every call."""

    def __init__(self, channel: grpc.Channel, metadata: Entries) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, kind: str) -> Any:
        def method(*names: Any, **codecs: Any) -> Any:
            rpc = getattr(self._channel, kind)(*names, **codecs)
            return lambda request, **options: rpc(request, metadata=self._metadata, **options)

        return method


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true")
    parser.add_argument("-cacert", type=Path)
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d", default="{}")
    parser.add_argument("address")
    parser.add_argument("what")
    given = parser.parse_args(arguments)
    assert given.plaintext != bool(given.cacert), "grpcurl speaks TLS unless told otherwise"
    metadata = tuple(tuple(entry.split(": ", 1)) for entry in given.H)
    channel = (
        grpc.insecure_channel(given.address)
        if given.plaintext
        else grpc.secure_channel(
            given.address, grpc.ssl_channel_credentials(given.cacert.read_bytes())
        )
    )
    with channel:
        client = ReflectionClient(channel, metadata)
        if given.what == "list":
            print(*client.services(), sep="\n")
            return
        request = sys.stdin.read() if given.d == "@" else given.d
        for answer in client.call(*given.what.split("/"), json.loads(request)):
            print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
