"""The vision tower against transformers' ``Qwen3VLVisionModel`` with the same random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmdeploy_ext.encoder import VisionConfig, VisionEncoder, VisionFeatures, layers
from lmdeploy_ext.encoder.grids import grid_tables
from lmdeploy_ext.packing import PackedImage
from tests.lmdeploy_ext.encoder.towers import oracle, ours, random_image, run_oracle

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # float32, largest absolute difference
HEADS = pytest.mark.parametrize("hidden_size", [128, 144], ids=["head64", "head72"])


def assert_close(
    features: VisionFeatures, expected: tuple[torch.Tensor, list[torch.Tensor]], tolerance: float
) -> None:
    embeddings, deepstack = expected
    assert sum(features.lengths) == len(features.embeddings)
    assert len(features.deepstack) == len(deepstack)
    for have, want in zip(
        (features.embeddings, *features.deepstack), (embeddings, *deepstack), strict=True
    ):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        assert (have.float() - want.float()).abs().max().item() <= tolerance


def some_images(rng: np.random.Generator) -> list[PackedImage]:
    """1 to 7 images of odd sizes: equal sizes, equal areas and frame pairs occur."""
    sides = rng.integers(1, 9, (rng.integers(1, 8), 2)) * 2
    sides = np.concatenate([sides, sides[: len(sides) // 3, ::-1]])
    return [random_image(rng, int(h), int(w), int(rng.integers(1, 3))) for h, w in sides]


@HEADS
@pytest.mark.parametrize("seed", range(6))
def test_equals_transformers(hidden_size: int, seed: int) -> None:
    model = oracle(seed, hidden_size=hidden_size)
    images = some_images(np.random.default_rng(seed))
    features = ours(model).encode(images)
    assert features.lengths == tuple(image.num_tokens for image in images)
    assert_close(features, run_oracle(model, images), TOLERANCE)


@pytest.mark.parametrize("missing", [AttributeError, RuntimeError, TypeError])
def test_without_the_fused_gelu_the_numbers_are_the_same(
    missing: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds of torch lack the operator, refuse to run it, or give it other arguments."""

    def absent(*_: object) -> torch.Tensor:
        raise missing("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    layers._gelu_fuses.cache_clear()
    try:
        model = oracle(3)
        images = some_images(np.random.default_rng(3))
        assert_close(ours(model).encode(images), run_oracle(model, images), TOLERANCE)
    finally:
        layers._gelu_fuses.cache_clear()


@HEADS
def test_each_image_alone_equals_the_batch(hidden_size: int) -> None:
    encoder = ours(oracle(hidden_size=hidden_size))
    rng = np.random.default_rng(7)
    images = [
        random_image(rng, h, w, t) for h, w, t in [(4, 6, 1), (2, 2, 2), (6, 4, 2), (4, 6, 1)]
    ]
    batch = encoder.encode(images)
    rows = np.cumsum((0, *batch.lengths))
    for image, start, end in zip(images, rows, rows[1:], strict=False):
        alone = encoder.encode([image])
        assert_close(
            alone,
            (batch.embeddings[start:end], [layer[start:end] for layer in batch.deepstack]),
            TOLERANCE,
        )


def test_long_image_and_full_position_grid() -> None:
    """More patches than one attention or row chunk, and the 48 x 48 grid of the real towers."""
    model = oracle(num_position_embeddings=2304, depth=2, deepstack_visual_indexes=[1])
    images = [
        random_image(np.random.default_rng(8), 62, 58),
        random_image(np.random.default_rng(9), 2, 70),
    ]
    assert_close(ours(model).encode(images), run_oracle(model, images), TOLERANCE)


@HEADS
def test_bfloat16(hidden_size: int) -> None:
    """As far from the float32 truth as transformers' own bfloat16, and close to it."""
    truth_model = oracle(hidden_size=hidden_size)
    images = some_images(np.random.default_rng(10))
    truth, truth_deepstack = run_oracle(truth_model, images)
    model = truth_model.to(torch.bfloat16)
    features = ours(model, torch.bfloat16).encode(images)
    expected = run_oracle(model, images)
    scale = max(t.abs().max().item() for t in (truth, *truth_deepstack))
    assert_close(features, expected, 0.02 * scale)
    for have, other, exact in zip(
        (features.embeddings, *features.deepstack),
        (expected[0], *expected[1]),
        (truth, *truth_deepstack),
        strict=True,
    ):
        our_error = (have.float() - exact).pow(2).mean().sqrt()
        their_error = (other.float() - exact).pow(2).mean().sqrt()
        assert our_error <= 1.2 * their_error


@pytest.mark.parametrize("damage", ["drop", "swap", "shift", "none"])
def test_a_fault_in_deepstack_changes_the_features(damage: str) -> None:
    """What `assert_close` must catch: a DeepStack feature dropped, swapped or shifted by a row."""
    model = oracle()
    images = [random_image(np.random.default_rng(11), 8, 10)]
    features = ours(model).encode(images)
    first, second, third = features.deepstack
    damaged = {
        "drop": (torch.zeros_like(first), second, third),
        "swap": (second, first, third),
        "shift": (first, second, third.roll(1, dims=0)),
        "none": (first, second, third),
    }[damage]
    changed = VisionFeatures(features.embeddings, damaged, features.lengths)
    if damage == "none":
        assert_close(changed, run_oracle(model, images), TOLERANCE)
    else:
        with pytest.raises(AssertionError):
            assert_close(changed, run_oracle(model, images), TOLERANCE)


def test_no_images() -> None:
    features = ours(oracle()).encode([])
    assert features.embeddings.shape == (0, 96)
    assert features.lengths == ()
    assert [layer.shape for layer in features.deepstack] == [(0, 96)] * 3


def test_refuses_patches_of_another_tower() -> None:
    encoder = ours(oracle())
    good = random_image(np.random.default_rng(12), 2, 2)
    with pytest.raises(ValueError, match="image 1: patches of 588 values"):
        encoder.encode([good, PackedImage(np.zeros((4, 588), np.uint8), (1, 2, 2))])
    with pytest.raises(ValueError, match="image 0: merge size 3"):
        encoder.encode([PackedImage(np.zeros((9, 768), np.uint8), (1, 3, 3), merge_size=3)])


def test_encode_leaves_its_input_and_its_tables_alone() -> None:
    encoder = ours(oracle())
    image = random_image(np.random.default_rng(13), 4, 4)
    before = image.patches.copy()
    first = encoder.encode([image])
    second = encoder.encode([image])
    np.testing.assert_array_equal(image.patches, before)
    torch.testing.assert_close(first.embeddings, second.embeddings, rtol=0, atol=0)
    assert not first.embeddings.requires_grad


def test_grid_tables_are_remembered_within_bounds() -> None:
    grid_tables.cache_clear()
    encoder = ours(oracle())
    rng = np.random.default_rng(14)
    encoder.encode([random_image(rng, 2, 4), random_image(rng, 2, 4)])
    assert grid_tables.cache_info().misses == 1
    for side in range(1, 30):
        encoder.encode([random_image(rng, 2, 2 * side)])
    info = grid_tables.cache_info()
    assert info.currsize == info.maxsize


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"hidden_size": 100, "num_heads": 3}, "heads"),
        ({"num_position_embeddings": 50}, "square"),
        ({"deepstack_visual_indexes": [1, 0]}, "must rise"),
        ({"deepstack_visual_indexes": [27]}, "must rise"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
    ],
)
def test_refuses_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_dict(changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    model = oracle()
    images = some_images(np.random.default_rng(15))
    config = VisionConfig.from_dict(model.config.to_dict())
    encoder = VisionEncoder.from_tensors(config, model.state_dict(), device="cuda")
    features = encoder.encode(images)
    assert features.embeddings.device.type == "cuda"
    moved = VisionFeatures(
        features.embeddings.cpu(), tuple(t.cpu() for t in features.deepstack), features.lengths
    )
    assert_close(moved, run_oracle(model, images), 1e-3)
