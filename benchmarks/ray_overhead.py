"""What replicas on Ray cost: the time that ``engine=ray`` adds to an engine, its throughput, and what happens
when a replica is lost.

``python -m benchmarks.ray_overhead [--quick] [--only PART]``. Ray runs on this machine. Ray Serve's own HTTP proxy is
measured beside, with the same engine in the same number of replicas. Takes about four minutes; ``--only`` measures
one part and stores nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import PIL.Image
import psutil

from benchmarks.batch import image
from benchmarks.common import environment, markdown, write_results
from service.client import CHANNEL_OPTIONS
from service.engine import Engine
from service.engines.fake import FakeEngine
from service.engines.ray import RayEngine
from service.engines.ray.cluster import CONNECTION, ClusterOptions
from service.engines.ray.plan import Plan, Scale
from service.engines.reference import ReferenceEngine
from service.errors import EngineUnavailable
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.settings import Settings
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import GenerateRequest, Image, Sampling
from service.wiring import BUNDLED_MODEL, build_registry

ROOT = Path(__file__).parents[1]
CLUSTER = ClusterOptions(None, store_bytes=100 * 1024 * 1024, cpus=8)
CALLERS = 16
IMAGES = [image(number) for number in range(1, 20)]
DRAWINGS = [np.asarray(PIL.Image.open(io.BytesIO(one)).convert("RGB")) for one in IMAGES]
assert IMAGE_ANALYSIS.grammar is not None
ANALYSIS_GRAMMAR = analyse(IMAGE_ANALYSIS.grammar, DEFAULT_LIMITS).grammar
NOTES = (
    "Ray on the same machine, loopback. direct: the engine in the process of the caller; ray: the same engine in "
    "a replica, reached through the engine protocol; one caller, in turns, medians. Throughput: reference engine,"
    " bundled model, 16 callers, in turns, medians; text: answers of 31 tokens, as streams, which take the engine"
    " 7 ms; image-analysis: that of a drawing, under its schema. The callers of the bare processes are inside of "
    "them, eight in each, so that nothing travels; two replicas need a third process for the callers, which takes"
    " its share of the cores. Processor time is that of all processes named, for each request. Servers: two "
    "`qwen3vl serve` with 8 callers each beside one with two replicas and 16 callers; RunTask of image-analysis "
    "over gRPC with a drawing, in turns, medians. Kill: SIGKILL to one of two replicas under 16 callers. proxy: "
    "one call of the fake engine through Ray Serve's own HTTP proxy, and through this server over gRPC."
)


def fake(token_delay_s: float = 0.0) -> Engine:
    return FakeEngine(token_delay_s=token_delay_s)


def reference() -> Engine:
    return ReferenceEngine(BUNDLED_MODEL, threads=1, max_batch=16)


def on_ray(name: str, build: Callable[[], Engine], replicas: int = 1) -> RayEngine:
    plan = Plan(name, build, Scale(replicas=replicas), {}, linger_s=0.0)
    return RayEngine(plan, CLUSTER)


def request(tokens: int = 64) -> GenerateRequest:
    return GenerateRequest("bench", "List every object.", sampling=Sampling(max_tokens=tokens))


def analysis(number: int) -> GenerateRequest:
    """AnalyzeImage on a drawing, as the service asks an engine for it."""
    return GenerateRequest(
        "bench",
        IMAGE_ANALYSIS.user,
        IMAGE_ANALYSIS.system,
        images=(Image(DRAWINGS[number % len(DRAWINGS)]),),
        grammar=ANALYSIS_GRAMMAR,
        sampling=Sampling(max_tokens=512),
        piecewise=False,
    )


WORK: dict[str, Callable[[int], GenerateRequest]] = {
    "text": lambda _: request(31),
    "image-analysis": analysis,
}
"""What the callers ask, by name; gets the number of the request."""


async def timed(engine: Engine, asked: GenerateRequest) -> tuple[float, float, int]:
    """Seconds to the first text and to the end, and the number of chunks."""
    begun, first, count = time.perf_counter(), 0.0, 0
    async for _ in engine.generate(asked):
        first = first or time.perf_counter() - begun
        count += 1
    return first, time.perf_counter() - begun, count


async def added(name: str, build: Callable[[], Engine], tokens: int, rounds: int) -> dict[str, Any]:
    """One caller, both engines in turns."""
    direct, ray = build(), on_ray(f"bench-{name}", build)
    await direct.start()
    await ray.start()
    found: dict[str, list[tuple[float, float, int]]] = {"direct": [], "ray": []}
    for turn in range(-10, rounds):
        pairs = [("direct", direct), ("ray", ray)]
        for one, engine in pairs if turn % 2 else reversed(pairs):
            sample = await timed(engine, request(tokens))
            if turn >= 0:
                found[one].append(sample)
    await direct.close()
    await ray.close()
    firsts, totals = (
        {one: 1e3 * statistics.median(s[place] for s in samples) for one, samples in found.items()}
        for place in (0, 1)
    )
    return {
        "row": f"{name} engine, {found['direct'][0][2]} chunks",
        "direct p50, ms": totals["direct"],
        "ray p50, ms": totals["ray"],
        "added, ms": totals["ray"] - totals["direct"],
        "first text, direct, ms": firsts["direct"],
        "first text, ray, ms": firsts["ray"],
        "first text, added, ms": firsts["ray"] - firsts["direct"],
        "rounds": rounds,
    }


async def many(engine: Engine, work: str, callers: int, seconds: float) -> float:
    """Requests per second of so many callers."""
    end, done, numbers = time.perf_counter() + seconds, 0, itertools.count()

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await timed(engine, WORK[work](next(numbers)))
            done += 1

    begun = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return done / (time.perf_counter() - begun)


async def bare(work: str, seconds: float) -> None:
    """In a process of its own: half of the callers, once for each line that comes in. Prints the rate, and the
    processor time of each request in ms."""
    engine = reference()
    await engine.start()
    await many(engine, work, CALLERS // 2, 1.0)
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        used_s = time.process_time()
        rate = await many(engine, work, CALLERS // 2, seconds)
        print(rate, 1e3 * (time.process_time() - used_s) / (rate * seconds), flush=True)
    await engine.close()


class BareProcesses:
    """Two processes with an engine and half of the callers each. Blocks until both are ready. Use as a context
    manager."""

    def __init__(self, work: str, seconds: float) -> None:
        words = ["--bare", work, str(seconds)]
        command = [sys.executable, "-m", "benchmarks.ray_overhead", *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._processes = [
            subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)
        ]

        for one in self._processes:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"

    def __enter__(self) -> BareProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._processes:
            assert one.stdin is not None
            one.stdin.close()
            one.wait()

    def measured(self) -> tuple[float, float]:
        """Requests per second of both, and the processor time of each in ms."""
        for one in self._processes:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        found = [[float(word) for word in one.stdout.readline().split()] for one in self._processes]
        rate = sum(one[0] for one in found)
        return rate, sum(one[0] * one[1] for one in found) / rate


async def with_replicas(engine: RayEngine, count: int) -> None:
    while engine.capabilities.details["replicas"] != str(count):
        await asyncio.sleep(0.1)
        await engine.check_health()


async def throughput(work: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Both sides run all the time; that whose turn it is not has no requests."""
    engine = on_ray(f"bench-{work}", reference, replicas=2)
    await engine.start()
    await with_replicas(engine, 2)
    await many(engine, work, CALLERS, 1.0)
    replicas = [psutil.Process(one) for one in await broadcast(engine, "process")]

    def used_s() -> list[float]:
        return [time.process_time(), sum(sum(one.cpu_times()[:2]) for one in replicas)]

    rates: list[tuple[float, float]] = []
    times: list[tuple[float, ...]] = []
    with await asyncio.to_thread(BareProcesses, work, seconds) as processes:
        for turn in range(rounds):
            theirs = await asyncio.to_thread(processes.measured) if turn % 2 else None
            before = used_s()
            ours = await many(engine, work, CALLERS, seconds)
            spent = [
                1e3 * (now - then) / (ours * seconds)
                for now, then in zip(used_s(), before, strict=True)
            ]
            theirs = theirs or await asyncio.to_thread(processes.measured)
            rates.append((ours, theirs[0]))
            times.append((*spent, theirs[1]))
    await engine.close()
    return {
        "row": f"throughput, {work}, {CALLERS} callers",
        "two bare processes, requests/s": statistics.median(theirs for _, theirs in rates),
        "two replicas, requests/s": statistics.median(ours for ours, _ in rates),
        "share": statistics.median(ours / theirs for ours, theirs in rates),
        "processor time of a request, ms": dict(
            zip(
                ("callers and front", "replicas", "bare processes"),
                (round(statistics.median(one), 2) for one in zip(*times, strict=True)),
                strict=True,
            )
        ),
        "rounds": [[round(ours, 1), round(theirs, 1)] for ours, theirs in rates],
    }


async def broadcast(engine: RayEngine, method: str) -> list[Any]:
    """The answers of all replicas."""
    found: list[Any] = await engine._handle.broadcast(method).results_async()
    return found


class Served:
    """`qwen3vl serve` with the reference engine, as a process. Use as a context manager."""

    def __init__(self, folder: Path, name: str, *words: str) -> None:
        self._log = folder / f"{name}.log"
        command = [
            sys.executable,
            "-m",
            "service",
            "serve",
            "--port",
            "0",
            "--threads",
            "1",
            *words,
        ]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stderr=log)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    async def address(self) -> str:
        while "SERVING on port " not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            await asyncio.sleep(0.1)
        port = self._log.read_text().rpartition("SERVING on port ")[2].partition(".")[0]
        return f"127.0.0.1:{port}"


async def asked(addresses: Sequence[str], seconds: float) -> float:
    """Requests per second of all callers, who are spread over servers."""
    end, numbers = time.perf_counter() + seconds, itertools.count()
    done = 0

    async def caller(stub: Any) -> None:
        nonlocal done
        while time.perf_counter() < end:
            shown = pb.Image(data=IMAGES[next(numbers) % len(IMAGES)])
            await stub.RunTask(
                pb.RunTaskRequest(task=pb.Task(name="image-analysis"), images=[shown])
            )
            done += 1

    async with AsyncExitStack() as stack:
        open_channel = partial(grpc.aio.insecure_channel, options=CHANNEL_OPTIONS)
        channels = [await stack.enter_async_context(open_channel(one)) for one in addresses]
        stubs = [VisionServiceStub(one) for one in channels]
        begun = time.perf_counter()
        await asyncio.gather(*(caller(stubs[turn % len(stubs)]) for turn in range(CALLERS)))
        return done / (time.perf_counter() - begun)


async def both_replicas(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = VisionServiceStub(channel)
        while (await stub.GetModel(pb.GetModelRequest())).details["replicas"] != "2":  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def servers(seconds: float, rounds: int) -> dict[str, Any]:
    """Two servers beside one with two replicas, both as an operator would run them."""
    replicas = ("--engine", "ray", "--ray-replicas", "2")
    rates: dict[str, list[float]] = {"servers": [], "replicas": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Served(Path(folder), "first") as first,
        Served(Path(folder), "second") as second,
        Served(Path(folder), "ray", *replicas) as ray,
    ):
        places = {
            "servers": [await first.address(), await second.address()],
            "replicas": [await ray.address()],
        }
        await both_replicas(places["replicas"][0])
        for turn in range(-1, rounds):
            for name, addresses in sorted(places.items(), reverse=bool(turn % 2)):
                rate = await asked(addresses, seconds)
                if turn >= 0:
                    rates[name].append(rate)
    pairs = list(zip(rates["replicas"], rates["servers"], strict=True))
    return {
        "row": f"servers, image-analysis, {CALLERS} callers",
        "two servers, requests/s": statistics.median(rates["servers"]),
        "two replicas, requests/s": statistics.median(rates["replicas"]),
        "share": statistics.median(ours / theirs for ours, theirs in pairs),
        "rounds": [[round(ours, 1), round(theirs, 1)] for ours, theirs in pairs],
    }


async def kill(seconds: float) -> dict[str, Any]:
    """One of two replicas is killed under all callers."""
    engine = on_ray("bench-kill", partial(fake, 0.02), replicas=2)
    await engine.start()
    await with_replicas(engine, 2)
    end = time.perf_counter() + seconds
    counts = {"answered": 0, "lost after text": 0, "lost without text": 0}

    async def caller() -> None:
        while time.perf_counter() < end:
            texts = 0
            try:
                async with aclosing(engine.generate(request())) as chunks:  # type: ignore[type-var]
                    async for _ in chunks:
                        texts += 1
                counts["answered"] += 1
            except EngineUnavailable:
                counts["lost after text" if texts else "lost without text"] += 1

    callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
    await asyncio.sleep(1.0)
    process = await engine._asked("process")
    killed = time.perf_counter()
    os.kill(process, signal.SIGKILL)
    while engine.capabilities.details["replicas"] == "2":
        await asyncio.sleep(0.1)
        await engine.check_health()
    noticed = time.perf_counter() - killed
    await with_replicas(engine, 2)
    full = time.perf_counter() - killed
    await asyncio.gather(*callers)
    await engine.close()
    return {
        "row": f"kill under {CALLERS} callers",
        **counts,
        "loss seen by the server, s": noticed,
        "full service, s": full,
    }


class Proxied:
    """The fake engine behind Ray Serve's own HTTP proxy."""

    def __init__(self) -> None:
        self._engine = FakeEngine()

    async def __call__(self, call: Any) -> str:
        await self._engine.start()
        body = await call.json()
        asked = GenerateRequest("proxied", body["user"], sampling=Sampling(max_tokens=64))
        return "".join([chunk.text async for chunk in self._engine.generate(asked)])


async def p50(ask: Callable[[], Any], rounds: int) -> float:
    times = []
    for turn in range(-10, rounds):
        begun = time.perf_counter()
        await ask()
        if turn >= 0:
            times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def start_proxy() -> None:
    from ray import serve

    serve.start(http_options={"host": "127.0.0.1", "port": 18_099})
    serve.run(serve.deployment(Proxied).bind(), name="bench-proxy", route_prefix="/")


async def proxy(rounds: int) -> dict[str, Any]:
    settings = Settings(port=0)
    server = VisionServer(settings, on_ray("bench-server", fake), build_registry(settings))
    await server.start()
    await server.load()
    inline = pb.InlineTask(user="List every object.")
    asked = pb.RunTaskRequest(task=pb.Task(inline=inline))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", CHANNEL_OPTIONS) as channel:
        stub: Any = VisionServiceStub(channel)
        ours = await p50(lambda: stub.RunTask(asked), rounds)
    async with aiohttp.ClientSession(trust_env=False) as session:

        async def ask() -> None:
            url = "http://127.0.0.1:18099/"
            async with session.post(url, json={"user": "List every object."}) as answer:
                assert answer.status == 200
                await answer.read()

        theirs = await p50(ask, rounds)
    await server.stop(0)
    return {
        "row": "one call of the fake engine, end to end",
        "this server over gRPC, ms": ours,
        "Ray Serve's HTTP proxy, ms": theirs,
        "rounds": rounds,
    }


def parts(*, quick: bool) -> dict[str, Callable[[], Coroutine[Any, Any, dict[str, Any]]]]:
    """What is measured, by the name of ``--only``."""
    rounds, seconds, turns = (20, 2.0, 1) if quick else (200, 6.0, 3)
    return {
        "fake": lambda: added("fake", fake, 64, rounds),
        "reference": lambda: added("reference", reference, 35, max(10, rounds // 5)),
        "throughput": lambda: throughput("text", seconds, turns),
        "throughput of analyses": lambda: throughput("image-analysis", seconds, turns),
        "servers": lambda: servers(seconds, turns),
        "kill": lambda: kill(12.0),
        "proxy": lambda: proxy(rounds),
    }


def measure(
    chosen: Sequence[Callable[[], Coroutine[Any, Any, dict[str, Any]]]],
) -> list[dict[str, Any]]:
    import ray

    CONNECTION.open(CLUSTER)
    start_proxy()  # Ray Serve starts proxies with its first application, or never
    rows = []
    try:
        for one in chosen:
            begun = time.perf_counter()
            row = asyncio.run(one())
            print(markdown([row]), f"({time.perf_counter() - begun:.0f} s)\n", flush=True)
            rows.append({**row, "ray version": ray.__version__})
    finally:
        CONNECTION.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see that it runs; stores nothing")
    parser.add_argument("--only", choices=list(parts(quick=True)), help="one part; stores nothing")
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        work, seconds = arguments.bare
        asyncio.run(bare(work, float(seconds)))
        return
    print(environment(), flush=True)
    all_parts = parts(quick=arguments.quick)
    rows = measure([all_parts[arguments.only]] if arguments.only else list(all_parts.values()))
    if not arguments.quick and not arguments.only:
        print(write_results("ray_overhead", rows, NOTES))


if __name__ == "__main__":
    main()
