"""The driver of a run: plans the shards, gives them to actors on Ray, and shows the progress.

Ray reads its environment when it is imported, so that comes after `CONNECTION` has prepared it.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import __version__
from service.batch.actors import ShardActor
from service.batch.counts import Board, Counts, Display, Snapshot
from service.batch.engine import Work
from service.batch.errors import BatchError, Stopped
from service.batch.outputs import Output, check_names, plan_of
from service.batch.places import absolute, is_local, opened
from service.batch.request import record_of
from service.batch.sources import InputOptions, Piece, Source, list_input
from service.engines.ray.cluster import CONNECTION, ClusterOptions
from service.errors import EngineUnavailable
from service.settings import Settings

MIB = 1 << 20
OBJECT_STORE_BYTES = 100 * MIB
"""Of a local Ray: rows never pass through it, only the places where they are."""
SHARDS_AT_ONCE = 2
"""Shards that an actor answers at the same time, so that its engine is full when one of them ends."""
RESTARTS = 3
"""How often engines may be started again without a shard being finished in between. Ray itself
starts an actor again whenever its process has died."""
LOOK_S = 10.0


@dataclass(frozen=True)
class Resources:
    """What the run uses.

    address: of a Ray cluster; None starts Ray on this machine. actors: None is one for each part of
    the GPUs of the cluster, or one without GPUs. gpus: for each actor; None is what the engine needs.
    """

    address: str | None = None
    actors: int | None = None
    cpus: float = 1.0
    gpus: float | None = None


@dataclass(frozen=True)
class Summary:
    """The end of a run. rows: of the input; counts: of this run alone."""

    rows: int
    shards: int
    counts: Counts
    skipped: int


def run_job(
    work: Work,
    settings: Settings,
    options: InputOptions,
    place: str,
    rows_per_shard: int,
    resources: Resources,
) -> Summary:
    """Answer what is not answered yet, and show the progress on stderr.

    Raises ``BatchError``, or ``Stopped`` after Ctrl-C.
    """
    _check_apart(options.where, place)
    source = list_input(options, rows_per_shard)
    check_names(source.key_schema, work.columns)
    plan = plan_of(__version__, options, source, record_of(work, settings), rows_per_shard)
    output = Output(place)
    with output.locked():
        output.agree(plan)
        done = output.done(source.pieces)
        counts = Counts()
        try:
            if len(done) < len(source.pieces):
                with _ray(resources):
                    counts = _answer(work, settings, output, source, done, resources)
        except KeyboardInterrupt:
            raise Stopped(len(output.done(source.pieces)), len(source.pieces)) from None
    rows = sum(piece.rows for piece in source.pieces)
    return Summary(rows, len(source.pieces), counts, source.skipped)


def _check_apart(where: str, place: str) -> None:
    """Raise ``BatchError`` where the output would become a part of the input of the next run."""
    inner, outer = opened(place)[1], opened(where)[1]
    if is_local(where) == is_local(place) and f"{inner}/".startswith(f"{outer}/"):
        raise BatchError(
            f"the output {place} is inside of the input {where}; choose another folder"
        )


def _answer(
    work: Work,
    settings: Settings,
    output: Output,
    source: Source,
    done: set[int],
    resources: Resources,
) -> Counts:
    """Have actors answer the shards that are not done."""
    import ray
    import ray.data

    pieces = source.pieces
    todo = [number for number in range(len(pieces)) if number not in done]
    actors, gpus = _actors(settings, resources, len(todo))
    board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote(actors + RESTARTS)
    arguments = (for_actors(settings), work, absolute(output.place), len(pieces), board)
    dataset = _shards(pieces, todo).map_batches(
        ShardActor,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_concurrent_calls_per_actor=SHARDS_AT_ONCE,
            max_tasks_in_flight_per_actor=SHARDS_AT_ONCE + 1,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.cpus,
        num_gpus=gpus,
    )
    total = sum(piece.rows for piece in pieces)
    before = sum(pieces[number].rows for number in done)
    with Display(total, before, lambda: _look(board)):
        try:
            for _ in dataset.iter_batches(batch_size=None):
                pass
        except KeyboardInterrupt:
            raise
        except Exception as error:
            raise _ended(board, error) from None
    last = _look(board)
    return Counts() if last is None else last.counts


def for_actors(settings: Settings) -> Settings:
    """The settings for actors, whose working directory is another one."""
    places: dict[str, Any] = {}
    if settings.model != "bundled" and Path(settings.model).exists():
        places["model"] = os.path.abspath(settings.model)
    given = {"tasks_dir": settings.tasks_dir, **dict(settings.engine_settings)}
    for name, place in given.items():  # those of an engine are such as its key and certificates
        if isinstance(place, Path):
            places[name] = place.absolute()
    return settings.model_copy(update=places)


def _shards(pieces: Sequence[Piece], todo: Sequence[int]) -> Any:
    """A data set with a block for each shard."""
    import ray.data

    rows = [{"shard": number, "piece": pickle.dumps(pieces[number])} for number in todo]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _look(board: Any) -> Snapshot | None:
    import ray

    try:
        state: Snapshot = ray.get(board.snapshot.remote(), timeout=LOOK_S)
    except Exception:  # the display is not worth an error; the run itself tells what is wrong
        return None
    return state


def _ended(board: Any, error: Exception) -> BatchError:
    """Why the run has ended: what an actor said, or else Ray."""
    state = _look(board)
    if state is not None and state.failure:
        return BatchError(state.failure)
    text = str(error).strip().splitlines() or [type(error).__name__]
    return BatchError(f"the run cannot go on: {text[-1]}")


def _actors(settings: Settings, resources: Resources, todo: int) -> tuple[int, float]:
    """The number of actors, and the GPUs of each. Raises ``BatchError`` for more than there is."""
    import ray

    there = ray.cluster_resources()
    gpus = resources.gpus
    if gpus is None:
        gpus = float(getattr(settings.engine_settings, "tensor_parallel", 0))
    actors = resources.actors
    if actors is None:
        actors = max(1, int(there.get("GPU", 0) // gpus)) if gpus else 1
    actors = min(actors, todo)
    for name, each in (("GPU", gpus), ("CPU", resources.cpus)):
        if each * actors > there.get(name, 0):
            raise BatchError(
                f"{actors} actors with {each:g} {name} each need {each * actors:g}, and Ray has "
                f"{there.get(name, 0):g}; see --actors, --gpus and --cpus"
            )
    return actors, gpus


@contextmanager
def _ray(resources: Resources) -> Iterator[None]:
    """A connection to Ray: to a cluster, or to one that lives as long as the body. Ray writes
    nothing to the terminal."""
    options = ClusterOptions(
        resources.address, OBJECT_STORE_BYTES, (resources.actors or 1) * resources.cpus
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        CONNECTION.open(options)
    except EngineUnavailable as error:
        raise BatchError(error.message) from None
    for number, handler in handlers.items():  # Ray has replaced them
        signal.signal(number, handler)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        CONNECTION.close()
