"""`qwen3vl batch`: a run that is killed, its answers, its speed behind the start, and its memory.

``python -m benchmarks.batch [--only speed | --only killed] [--rows 5000] [--quick]`` from the repository root.
The input is a Parquet file of drawings, of which every 20th is damaged. Three parts, all on the bundled model
with one thread; the first one is stored as ``batch_speed``, the others as ``batch``:

* speed: the same rows by the engine alone, in a process of its own with as many requests at once as a
  batch, and by `qwen3vl batch`, taking turns. A batch counts from its first complete file to its last.
* killed: a run is killed (SIGKILL) three times at moments of chance and then goes on to its end. Every
  key must be there once, and the damaged images must be the rows with an error. Memory is that of the
  process of its engine in the last run, a sample each second, without the first tenth.
* single calls: every row is asked over gRPC. Answers and reasons must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PillowImage

from benchmarks.common import markdown, write_results
from examples.drawings.scenes import HELD_OUT_SEED, draw, scene
from service.client import CHANNEL_OPTIONS, read_error
from service.engines.reference import ReferenceEngine
from service.grpc_api.server import VisionServer
from service.inference.runner import run
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings
from service.tasks.registry import load_registry
from service.types import Image, Sampling
from service.wiring import BUNDLED_MODEL, build_registry

ROOT = Path(__file__).parents[1]
BAD_EVERY = 20
SIZE = (128, 128)
KILLS = 3
SETTINGS = {"engine": "reference", "threads": 1}
SLOTS = Settings(**SETTINGS).slots
MIB = 1 << 20
TASK = "image-analysis"


def image(number: int) -> bytes:
    """A drawing as PNG, or a damaged file: empty, another format, cut, or not an image."""
    file = io.BytesIO()
    draw(scene(HELD_OUT_SEED + number), HELD_OUT_SEED + number, SIZE).save(file, "PNG")
    data = file.getvalue()
    if number % BAD_EVERY:
        return data
    kinds = (b"", b"GIF89a" + data[6:], data[: len(data) // 2], b"no image")
    return kinds[number // BAD_EVERY % len(kinds)]


def write_input(path: Path, rows: int) -> None:
    with pq.ParquetWriter(path, pa.schema([("id", pa.int64()), ("image", pa.binary())])) as writer:
        for start in range(0, rows, 500):
            ids = range(start, min(start + 500, rows))
            writer.write_table(pa.table({"id": ids, "image": [image(one) for one in ids]}))


def engine_alone(rows: int) -> float:
    """Rows per second of the engine, without a server around it, from image files to answers."""
    files = [image(one) for one in range(rows) if one % BAD_EVERY]
    task = load_registry(None).get(TASK)

    async def answer_all() -> float:
        engine = ReferenceEngine(BUNDLED_MODEL, threads=1)
        await engine.start()
        room = asyncio.Semaphore(SLOTS)

        async def one(number: int, data: bytes) -> None:
            async with room:
                pixels = await asyncio.to_thread(_pixels, data)
                await run(
                    engine, task, [Image(pixels)], Sampling(), timeout_s=600, request_id=str(number)
                )

        await one(-1, files[0])
        begun = time.perf_counter()
        await asyncio.gather(*(one(number, data) for number, data in enumerate(files)))
        took_s = time.perf_counter() - begun
        await engine.close()
        return len(files) / took_s

    return asyncio.run(answer_all())


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(PillowImage.open(io.BytesIO(data)).convert("RGB"))


def begin(source: Path, out: Path, shard_rows: int) -> subprocess.Popen[bytes]:
    words = ["batch", str(source), str(out), "--task", TASK, "--shard-rows", str(shard_rows)]
    chosen = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *words, *chosen], cwd=ROOT, stderr=log
        )


def batch_speed(source: Path, out: Path, shard_rows: int) -> tuple[float, float]:
    """Rows with answers per second between the first and the last complete file of a run, and
    the seconds of the whole run."""
    begun = time.perf_counter()
    assert begin(source, out, shard_rows).wait() == 0, out.with_suffix(".log").read_text()
    took_s = time.perf_counter() - begun
    files = sorted(out.glob("part-*"), key=lambda one: one.stat().st_mtime_ns)
    first, *rest = files
    answered = sum(_answered(one) for one in rest)
    between_s = (rest[-1].stat().st_mtime_ns - first.stat().st_mtime_ns) / 1e9
    return answered / between_s, took_s


def _answered(file: Path) -> int:
    return pq.read_table(file, columns=["error_reason"])["error_reason"].null_count


def killed_run(source: Path, out: Path, shard_rows: int, rows: int) -> dict[str, Any]:
    """A run that is killed three times, each time after a part of chance of what is left."""
    chance, memory, shards = random.Random(21), [], -(-rows // shard_rows)
    complete_at_kill = []
    for kill in range(KILLS):
        process = begin(source, out, shard_rows)
        known = len(list(out.glob("part-*")))
        wanted = known + max(1, round((shards - known) * chance.uniform(0.1, 0.4)))
        while len(list(out.glob("part-*"))) < wanted:
            assert process.poll() is None, out.with_suffix(".log").read_text()
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.wait()
        complete_at_kill.append(len(list(out.glob("part-*"))))
        print(f"  killed at {complete_at_kill[-1]} of {shards} files ({kill + 1})", flush=True)
    process = begin(source, out, shard_rows)
    while process.poll() is None:
        memory.append(engine_bytes(process.pid))
        time.sleep(1)
    assert process.returncode == 0, out.with_suffix(".log").read_text()
    table = pq.read_table(out)
    keys = Counter(table["id"].to_pylist())
    errors = {row["id"] for row in table.to_pylist() if row["error_reason"]}
    steady = [one for one in memory if one]
    steady = steady[len(steady) // 10 :]
    third = max(1, len(steady) // 3)
    first, last = (statistics.median(part) / MIB for part in (steady[:third], steady[-third:]))
    return {
        "part": "killed",
        "rows": rows,
        "files": shards,
        "files_complete_at_each_kill": complete_at_kill,
        "keys_missing": rows - len(keys),
        "keys_doubled": sum(1 for count in keys.values() if count > 1),
        "error_rows": len(errors),
        "error_rows_of_good_images_or_missing": len(errors ^ set(range(0, rows, BAD_EVERY))),
        "engine_mib_first_third": first,
        "engine_mib_last_third": last,
        "engine_mib_growth_percent": 100 * (last / first - 1),
        "engine_samples": len(steady),
    }


def engine_bytes(pid: int) -> int:
    """Private memory of the engine's process of a run; 0 where there is none yet."""
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "ShardActor" in " ".join(child.cmdline()):
                return int(child.memory_full_info().uss)
        except psutil.Error:
            continue
    return 0


def _batched(out: Path) -> dict[int, tuple[str | None, str | None, str | None]]:
    columns = ["id", "json", "error_reason", "error_message"]
    rows = pq.read_table(out, columns=columns).to_pylist()
    return {row["id"]: (row["json"], row["error_reason"], row["error_message"]) for row in rows}


async def single_calls(rows: int) -> dict[int, tuple[str | None, str | None, str | None]]:
    """The answer, or the reason and message, of a call over gRPC for each row."""
    settings = Settings(port=0, **SETTINGS)
    engine = ReferenceEngine(BUNDLED_MODEL, threads=1)
    server = VisionServer(settings, engine, build_registry(settings))
    await server.start()
    await server.load()
    found: dict[int, tuple[str | None, str | None, str | None]] = {}
    room = asyncio.Semaphore(SLOTS)

    async def one(stub: Any, number: int) -> None:
        async with room:
            shown = pb.Image(data=image(number))
            try:
                response = await stub.RunTask(
                    pb.RunTaskRequest(task=pb.Task(name=TASK), images=[shown])
                )
                found[number] = (response.result.json, None, None)
            except grpc.aio.AioRpcError as error:
                read = read_error(error)
                found[number] = (None, read.reason, read.message)

    address = f"127.0.0.1:{server.port}"
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = VisionServiceStub(channel)
        await asyncio.gather(*(one(stub, number) for number in range(rows)))
    await server.stop(0)
    return found


def measure_speed(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """The engine alone and a batch, in turns."""
    source = folder / "speed.parquet"
    write_input(source, rows)
    pairs: list[tuple[float, float]] = []
    whole_s = []
    for number in range(rounds):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            alone = process.submit(engine_alone, rows).result()
        batched, took_s = batch_speed(source, folder / f"speed-{number}", 32)
        pairs.append((alone, batched))
        whole_s.append(took_s)
        print(f"  engine {alone:.1f} rows/s, batch {batched:.1f} rows/s", flush=True)
    return {
        "part": "speed",
        "rows": rows,
        "engine_rows_per_s": statistics.median(alone for alone, _ in pairs),
        "batch_rows_per_s": statistics.median(batched for _, batched in pairs),
        "ratio": statistics.median(batched / alone for alone, batched in pairs),
        "batch_whole_s": statistics.median(whole_s),
        "rounds": [[round(alone, 2), round(batched, 2)] for alone, batched in pairs],
    }


def measure_killed(folder: Path, rows: int, shard_rows: int) -> list[dict[str, Any]]:
    """A run that is killed, and single calls with the same images."""
    source, out = folder / "in.parquet", folder / "out"
    write_input(source, rows)
    killed = killed_run(source, out, shard_rows, rows)
    print(markdown([killed]), flush=True)
    batch, single = _batched(out), asyncio.run(single_calls(rows))
    other = sorted(number for number in single if batch.get(number) != single[number])
    return [
        killed,
        {
            "part": "single calls",
            "rows": rows,
            "equal": rows - len(other),
            "other": other[:20],
            "errors_by_reason": dict(Counter(one[1] for one in single.values() if one[1])),
        },
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch")
    parser.add_argument("--only", choices=["speed", "killed"])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--speed-rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    options = parser.parse_args(words)
    if options.quick:
        options.rows, options.speed_rows, options.rounds = 400, 150, 1
    note = "qwen3vl batch on a local Ray, reference engine with one thread, bundled model."
    good = True
    with tempfile.TemporaryDirectory(prefix="batch") as folder:
        if options.only != "killed":
            speed = measure_speed(Path(folder), options.speed_rows, options.rounds)
            print(markdown([speed]), write_results("batch_speed", [speed], note), sep="\n")
        if options.only != "speed":
            killed, calls = measure_killed(Path(folder), options.rows, options.shard_rows)
            print(markdown([calls]), write_results("batch", [killed, calls], note), sep="\n")
            wrong = ("keys_missing", "keys_doubled", "error_rows_of_good_images_or_missing")
            good = not calls["other"] and not any(killed[name] for name in wrong)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
