"""The methods of VisionService: decode, call, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from service.auth import current
from service.grpc_api import codec, grammar_codec
from service.grpc_api.large_messages import LargeMessages, received_bytes
from service.inference.ahead import ahead
from service.inference.calls import Call, TaskDescription
from service.inference.pipeline import Inference
from service.inference.request_checks import on_engine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1 import vision_pb2_grpc as pb_grpc
from service.runtime import Runtime
from service.tasks.contract import Task

Context = grpc.aio.ServicerContext[Any, Any]


class VisionServicer(pb_grpc.VisionServiceServicer):
    """The handlers. They let errors pass; the interceptor converts errors to a gRPC status."""

    def __init__(self, runtime: Runtime, large: LargeMessages) -> None:
        self._runtime = runtime
        self._large = large
        self._registry = runtime.registry
        self._settings = runtime.settings

    @property
    def inference(self) -> Inference:
        """The inference of calls that name no model."""
        return self._runtime.inference_for()

    async def AnalyzeImage(
        self, request: pb.AnalyzeImageRequest, context: Context
    ) -> pb.AnalyzeImageResponse:
        call = await self._decoded(codec.decode_analyze, request)
        inference = self._runtime.inference_for(request.model or None)
        del request  # the call has the images: one copy of them waits
        answer = await inference.answer(call, context.time_remaining())
        return codec.encode_analysis(answer)

    async def RunTask(self, request: pb.RunTaskRequest, context: Context) -> pb.RunTaskResponse:
        call = await self._decoded(codec.decode_run, request)
        inference = self._runtime.inference_for(request.model or None)
        del request  # the call has the images: one copy of them waits
        answer = await inference.answer(call, context.time_remaining())
        return pb.RunTaskResponse(result=codec.encode_result(answer))

    async def StreamTask(
        self, request: pb.StreamTaskRequest, context: Context
    ) -> AsyncIterator[pb.StreamTaskResponse]:
        call = await self._decoded(codec.decode_run, request)
        inference = self._runtime.inference_for(request.model or None)
        del request  # the call has the images: one copy of them waits
        events = ahead(inference.events(call, context.time_remaining()))
        async with aclosing(events) as open_events:
            async for event in open_events:
                yield codec.encode_event(event)

    async def ValidateSchema(
        self, request: pb.ValidateSchemaRequest, context: Context
    ) -> pb.ValidateSchemaResponse:
        grammar = codec.decode_validate(request)
        time_left_s = context.time_remaining()
        inference = self._runtime.inference_for(request.model or None)
        validation = await inference.validate(grammar, time_left_s, current.get())
        return grammar_codec.encode_validation(validation)

    async def ListTasks(
        self, request: pb.ListTasksRequest, context: Context
    ) -> pb.ListTasksResponse:
        codec.refuse_unknown_fields(request)
        tasks = sorted(self._registry.list(), key=lambda task: task.name)
        return pb.ListTasksResponse(
            tasks=[codec.encode_task(self._described(task)) for task in tasks]
        )

    async def GetTask(self, request: pb.GetTaskRequest, context: Context) -> pb.GetTaskResponse:
        codec.refuse_unknown_fields(request)
        task = self._registry.get(codec.decode_task_name(request.name, "name"))
        return pb.GetTaskResponse(task=codec.encode_task(self._described(task)))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        codec.refuse_unknown_fields(request)
        inference = self._runtime.inference_for(request.name or None)
        return codec.encode_model(inference.capabilities, self._settings)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        codec.refuse_unknown_fields(request)
        served = self._runtime.models.values()
        return pb.ListModelsResponse(
            models=[
                codec.encode_model_info(one.capabilities, one.refusal is None) for one in served
            ]
        )

    async def _decoded(self, decode: Callable[..., Call], request: Any) -> Call:
        """A request with images as a call."""
        size = received_bytes.get() if request.images else 0
        return await self._large.off_loop(size, decode, request, self._settings, current.get())

    def _described(self, task: Task) -> TaskDescription:
        """The public description of a task on this engine."""
        task = on_engine(task, self.inference.capabilities)
        return TaskDescription(
            task.name, task.description, task.needs_image, task.grammar, task.report
        )
