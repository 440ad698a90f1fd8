"""The hook library on small modules that call as TurboMind's does, built here: no LMDeploy, no GPU."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdeploy_ext.deepstack import library
from lmdeploy_ext.deepstack.binding import Event, Hook, Kind

pytestmark = pytest.mark.slow  # compiles

NAMES = {
    "mrope": "_ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiiP11CUstream_st",
    "merge": "_ZN9turbomind24invokeFusedPosEmbedMergeEPvPKvS2_PKiS2_iiNS_8DataTypeEP11CUstream_st",
    "layer_norm": (
        "_ZN9turbomind27invokeResidualBiasLayerNormEPvS0_PKvS2_S2_NS_8DataTypeEiifP11CUstream_st"
    ),
    "rms_norm": (
        "_ZN9turbomind25invokeResidualBiasRMSNormEPvS0_PKvS2_NS_8DataTypeEiifbP11CUstream_st"
    ),
}
MODULE = """
#include <stdbool.h>
typedef void *P; typedef const void *C;
int calls[4]; float seen_epsilon; bool seen_centred; P seen_stream;
void MROPE(int *a, C b, int c, int d, P s) { calls[0]++; seen_stream = s; }
void MERGE(P a, C b, C c, const int *d, C e, int f, int g, int h, P s) { calls[1]++; seen_stream = s; }
void LAYER_NORM(P a, P b, C c, C d, C e, int f, int g, int h, float i, P s) {
  calls[2]++; ((int *)b)[0] += 100; seen_epsilon = i; seen_stream = s;
}
void RMS_NORM(P a, P b, C c, C d, int e, int f, int g, float h, bool i, P s) {
  calls[3]++; seen_epsilon = h; seen_centred = i; seen_stream = s;
}
void set_up(C segments, int n, P s) { MROPE(0, segments, n, 9, s); }
void forward(P patches, P hidden, int blocks, int layers, P s) {
  if (blocks) MERGE(patches, 0, 0, 0, 0, 64, 32, 7, s);
  for (int i = 0; i < 2 * blocks; ++i) LAYER_NORM(0, patches, 0, 0, 0, 7, 32, 64, 0.5f, s);
  for (int i = 0; i < 2 * layers; ++i) RMS_NORM(0, hidden, 0, 0, 8, 48, 20, 0.25f, true, s);
}
"""
SEGMENTS = (ctypes.c_int * 6)(0, 16, 0, 4, 4, 0)


class Module:
    """A module like TurboMind's, loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)  # RTLD_NOW, as Python imports extensions
        self.patches, self.hidden = ctypes.c_int(0), ctypes.c_int(0)

    def set_up(self) -> None:
        self.library.set_up(SEGMENTS, 1, ctypes.c_void_p(77))

    def forward(self, blocks: int, layers: int) -> None:
        addresses = ctypes.byref(self.patches), ctypes.byref(self.hidden)
        self.library.forward(*addresses, blocks, layers, ctypes.c_void_p(78))

    def calls(self) -> list[int]:
        return list((ctypes.c_int * 4).in_dll(self.library, "calls"))


Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, compiler: str) -> Build:
    """Compile the module under another name each time, perhaps with other flags or without a function."""
    count = iter(range(99))

    def compile_it(*flags: str, without: str = "") -> Path:
        source = tmp_path / "module.c"
        source.write_text(MODULE)
        path = tmp_path / f"module{next(count)}.so"
        names = [
            f"-D{key.upper()}={'renamed' if key == without else name}"
            for key, name in NAMES.items()
        ]
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", *names, *flags]
        subprocess.run([*command, str(source), "-o", str(path)], check=True)
        return path

    return compile_it


@pytest.fixture
def hook(tmp_path: Path, compiler: str) -> Hook:
    """A copy of the library of its own."""
    path = tmp_path / "hook.so"
    library.build(path)
    return Hook(path)


def attached(hook: Hook, path: Path) -> tuple[Module, list[Event]]:
    module, events = Module(path), list[Event]()
    assert hook.attach(module.path) is None
    hook.listen(events.append, [0, 2], 2)
    return module, events


def test_events_of_a_forward_with_images_are_reported_in_order(hook: Hook, build: Build) -> None:
    module, events = attached(hook, build())
    assert hook.bound() == 4
    module.set_up()
    module.forward(3, 4)
    assert [(event.kind, event.index) for event in events] == [
        (Kind.SEGMENTS, 0),
        (Kind.VISION_BEGINS, 0),
        (Kind.BLOCK_ENDS, 0),
        (Kind.BLOCK_ENDS, 2),
        (Kind.LAYER_ENDS, 0),
        (Kind.LAYER_ENDS, 1),
    ]
    assert (events[0].data, events[0].count, events[0].stream) == (
        ctypes.addressof(SEGMENTS),
        1,
        77,
    )
    patches = ctypes.addressof(module.patches)
    assert events[2] == Event(Kind.BLOCK_ENDS, 0, patches, 64, 32, 7, 78)
    hidden = ctypes.addressof(module.hidden)
    assert events[4] == Event(Kind.LAYER_ENDS, 0, hidden, 20, 48, 8, 78)


def test_blocks_are_reported_after_and_layers_before_the_original_function(
    hook: Hook, build: Build
) -> None:
    module = Module(build())
    assert hook.attach(module.path) is None
    seen: list[tuple[Kind, int, int]] = []

    def look(event: Event) -> None:
        done = module.patches.value // 100 if event.kind == Kind.BLOCK_ENDS else module.calls()[3]
        seen.append((event.kind, event.index, done))

    hook.listen(look, [0, 2], 2)
    module.forward(3, 4)
    assert seen[1:] == [
        (Kind.BLOCK_ENDS, 0, 2),  # both functions of block 0 have added their part
        (Kind.BLOCK_ENDS, 2, 6),
        (
            Kind.LAYER_ENDS,
            0,
            1,
        ),  # the one behind attention is through, the one behind the MLP is not
        (Kind.LAYER_ENDS, 1, 3),
    ]


def test_originals_get_every_call_with_its_arguments(hook: Hook, build: Build) -> None:
    module, _ = attached(hook, build())
    module.set_up()
    module.forward(3, 4)
    module.forward(0, 4)
    assert module.calls() == [1, 1, 6, 16]
    assert ctypes.c_float.in_dll(module.library, "seen_epsilon").value == 0.25
    assert ctypes.c_bool.in_dll(module.library, "seen_centred").value is True
    assert ctypes.c_void_p.in_dll(module.library, "seen_stream").value == 78


def test_forwards_without_images_are_not_reported(hook: Hook, build: Build) -> None:
    module, events = attached(hook, build())
    for _ in range(5):
        module.forward(0, 4)
    assert events == []
    module.forward(3, 4)
    told = len(events)
    module.forward(0, 4)
    assert len(events) == told, "what was under way has ended with the last wanted layer"


def test_threads_do_not_disturb_each_other(hook: Hook, build: Build) -> None:
    """While one thread is inside a forward with images, another one decodes."""
    module, events = attached(hook, build())
    started, ended = threading.Event(), threading.Event()

    def stop_in_the_middle(event: Event) -> None:
        events.append(event)
        if event.kind == Kind.BLOCK_ENDS and event.index == 2:
            started.set()
            assert ended.wait(20)

    hook.listen(stop_in_the_middle, [0, 2], 2)
    thread = threading.Thread(target=module.forward, args=(3, 4))
    thread.start()
    assert started.wait(20)
    before = len(events)
    module.forward(0, 4)
    assert len(events) == before
    ended.set()
    thread.join(20)
    assert [event.index for event in events if event.kind == Kind.LAYER_ENDS] == [0, 1]


def test_silence_and_detach(hook: Hook, build: Build) -> None:
    module, events = attached(hook, build())
    hook.silence()
    module.forward(3, 4)
    assert events == []
    hook.listen(events.append, [0], 1)
    hook.detach()
    assert hook.bound() == 0
    module.set_up()
    module.forward(3, 4)
    assert events == []
    assert module.calls() == [1, 2, 12, 16]
    assert hook.attach(module.path) is None
    module.forward(3, 4)
    assert events


@pytest.mark.parametrize("name", list(NAMES))
def test_a_missing_function_is_named(hook: Hook, build: Build, name: str) -> None:
    module = Module(build(without=name))
    assert hook.attach(module.path) == f"it has no function {NAMES[name]}"
    assert hook.bound() == 0
    module.forward(3, 4)
    assert module.calls() == [0, 1, 6, 8]


def test_calls_bound_at_link_time_are_refused(hook: Hook, build: Build) -> None:
    wrong = hook.attach(Module(build("-Wl,-Bsymbolic")).path)
    assert wrong is not None
    assert "calls _ZN9turbomind22invokeMropePositionIds" in wrong
    assert "directly" in wrong


def test_a_read_only_table_of_calls_is_refused(hook: Hook, build: Build) -> None:
    wrong = hook.attach(Module(build("-Wl,-z,relro,-z,now")).path)
    assert wrong is not None
    assert wrong.startswith("its table of calls is read-only")


def test_a_function_hooked_by_another_library_is_refused(
    hook: Hook, build: Build, tmp_path: Path
) -> None:
    module, _ = attached(hook, build())
    other = tmp_path / "other.so"
    library.build(other)
    wrong = Hook(other).attach(module.path)
    assert wrong == f"{NAMES['mrope']} is already taken over by {tmp_path}/hook.so"


def test_a_module_that_is_not_loaded_is_refused(hook: Hook, tmp_path: Path) -> None:
    assert hook.attach(f"{tmp_path}/none.so") == f"{tmp_path}/none.so is not loaded"


def test_vision_blocks_above_the_maximum_are_refused(hook: Hook) -> None:
    with pytest.raises(ValueError, match="not all below 64"):
        hook.listen(lambda event: None, [64], 1)
