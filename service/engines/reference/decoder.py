"""Qwen3-VL's text decoder, dense or mixture of experts, on ragged rows.

One forward pass computes rows of many requests that decode, or a part of one prompt. Linear layers
process all rows at once; attention reads only the request's own rows of the cache. The numbers
equal those of transformers' ``Qwen3VLTextModel`` and ``Qwen3VLMoeTextModel``.

**Same answer alone and in a batch.** Linear layers compute each row independently of the others
(see `linear`), each answer row has its own attention call, and a prompt is cut at fixed positions
into parts that are computed separately. So the logits of a request do not depend on the other
requests; on x86 a test checks that they are equal bit for bit.

Letters: R rows; D hidden size; H query heads; K key-value heads; G = H/K; d head dimension;
T rows of the request's memory; I intermediate size; E experts; M image rows; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.engines.common.config import MoeConfig, TextConfig
from service.engines.reference.cache import KeyValueCache, LayerMemory
from service.engines.reference.linear import Linear, Norm
from service.engines.reference.rotary import to_pairs
from service.engines.reference.weights import EMBEDDING, HEAD, NORM, TEXT, Checkpoint

Load = Callable[[str], Tensor]
"""Reads a tensor by its name in the checkpoint, with the dtype and device of the decoder."""


@dataclass(frozen=True, slots=True)
class DeepStack:
    """Vision features for the image rows of a part of a prompt.

    rows: int64 (M,), indices of the image tokens among the rows of the pass.
    features: features[k], (M, D), is added to the residual stream after layer k.
    """

    rows: Tensor
    features: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """The rows of one forward pass.

    hidden: embeddings (R, D). Rows beyond those of the spans are padding.
    rotary: complex64 (R, 1, d/2).
    memory_rows: int64 (R,), the pool row for each row's key and value.
    spans: for each answer row, the range ``[begin, end)`` of pool rows that it attends to,
        including itself. For a part of a prompt, one range that ends with this part.
    prompt: number of rows that belong to a part of a prompt; 0 for answer rows.
    """

    hidden: Tensor
    rotary: Tensor
    memory_rows: Tensor
    spans: Sequence[tuple[int, int]]
    prompt: int
    deepstack: DeepStack | None = None


class Attention:
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TextConfig, prefix: str, load: Load) -> None:
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim
        prefix += "self_attn."

        def fused(kind: str) -> Tensor:
            return torch.cat(
                [
                    to_pairs(load(f"{prefix}q_proj.{kind}"), self._heads),
                    to_pairs(load(f"{prefix}k_proj.{kind}"), self._kv_heads),
                    load(f"{prefix}v_proj.{kind}"),
                ]
            )

        bias = config.attention_bias
        self._qkv = Linear(fused("weight"), fused("bias") if bias else None)
        self._out = Linear(
            load(f"{prefix}o_proj.weight"), load(f"{prefix}o_proj.bias") if bias else None
        )
        q_norm = to_pairs(load(f"{prefix}q_norm.weight"), 1).expand(self._heads, -1)
        k_norm = to_pairs(load(f"{prefix}k_norm.weight"), 1).expand(self._kv_heads, -1)
        self._norm = Norm(torch.cat([q_norm, k_norm]).float(), config.rms_norm_eps)  # (H + K, d)

    def __call__(self, x: Tensor, residual: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """x, residual (R, D) -> residual + attention (R, D); writes keys and values."""
        query = self._project(x, step, memory)
        attend = self._prompt if step.prompt else self._answers
        return self._out.add(attend(query, step, memory), residual)

    def last(self, x: Tensor, residual: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """The same for a part of a prompt, but returns only its last row, (1, D)."""
        row = step.prompt - 1
        query = self._project(x, step, memory).narrow(0, row, 1)
        return self._out.add(self._answers(query, step, memory), residual.narrow(0, row, 1))

    def _project(self, x: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """x (R, D) -> queries (R, H, d); writes keys and values."""
        rows, heads, rotated = x.shape[0], self._heads, self._heads + self._kv_heads
        qkv = self._qkv(x).view(rows, -1, self._head_dim)  # (R, H + 2K, d)
        # Always in float32, because the rotation is not exact in bfloat16.
        turned = self._norm(qkv[:, :rotated].float())
        pairs = torch.view_as_complex(turned.view(rows, rotated, -1, 2))
        pairs *= step.rotary
        qkv[:, :rotated] = turned
        memory.both.index_copy_(1, step.memory_rows, qkv[:, heads:].transpose(0, 1))
        return qkv[:, :heads]

    def _prompt(self, query: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """query (R, H, d), one span -> (R, H*d). Causal: each row attends to itself and earlier
        rows."""
        (begin, end), rows = step.spans[0], step.prompt
        grouped = query[:rows].view(rows, self._kv_heads, -1, query.shape[-1]).permute(1, 2, 0, 3)
        key, value = (
            part[0, :, begin:end].unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)  # (K, G, T, d)
            for part in (memory.keys, memory.values)
        )
        before = end - begin - rows
        mask = None
        if before:
            mask = torch.ones(rows, end - begin, dtype=torch.bool, device=query.device).tril(before)
        out = F.scaled_dot_product_attention(grouped, key, value, mask, is_causal=not before)
        merged = out.permute(2, 0, 1, 3).reshape(rows, -1)
        return F.pad(merged, (0, 0, 0, query.shape[0] - rows))

    def _answers(self, query: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """query (R, H, d), a span for each row -> (R, H*d).

        The G query heads of a key head are passed as query positions.
        """
        rows, keys, values = query.shape[0], memory.keys, memory.values
        grouped = query.reshape(rows, self._kv_heads, -1, self._head_dim)
        outputs = [
            F.scaled_dot_product_attention(
                row, keys.narrow(2, begin, end - begin), values.narrow(2, begin, end - begin)
            )
            for row, (begin, end) in zip(torch.split(grouped, 1), step.spans, strict=False)
        ]
        if len(outputs) < rows:
            outputs.append(torch.zeros_like(grouped[len(outputs) :]))
        return (outputs[0] if rows == 1 else torch.cat(outputs)).view(rows, -1)


class DenseMlp:
    """SwiGLU."""

    def __init__(self, prefix: str, load: Load) -> None:
        gate, up = load(prefix + "mlp.gate_proj.weight"), load(prefix + "mlp.up_proj.weight")
        self._width = gate.shape[0]
        self._gate_up = Linear(torch.cat([gate, up]))
        self._down = Linear(load(prefix + "mlp.down_proj.weight"))

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (R, D) -> residual + MLP (R, D)."""
        gate_up = self._gate_up(x)
        inner = F.silu(gate_up[:, : self._width])
        inner *= gate_up[:, self._width :]
        return self._down.add(inner, residual)


class MoeMlp:
    """Mixture of experts: each row uses its top k experts, weighted by normalised probabilities."""

    def __init__(self, config: MoeConfig, prefix: str, load: Load) -> None:
        self._top = config.experts_per_token
        self._width = config.intermediate_size
        self._router = Linear(load(prefix + "mlp.gate.weight"))
        self._gate_up = [Linear(expert) for expert in load(prefix + "mlp.experts.gate_up_proj")]
        self._down = [Linear(expert) for expert in load(prefix + "mlp.experts.down_proj")]

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual (R, D) -> residual + MLP (R, D)."""
        shares = self._router(x).float().softmax(-1)  # (R, E)
        weights, chosen = shares.topk(self._top, dim=-1)  # (R, k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        # Outputs are stored and added in the order of their rank, so that the sum of a row does not
        # depend on the experts of other rows.
        ranked = x.new_empty(x.shape[0], self._top, x.shape[1])
        for expert in torch.unique(chosen).tolist():
            rows, rank = torch.where(chosen == expert)
            gate_up = self._gate_up[expert](x[rows])
            inner = F.silu(gate_up[:, : self._width]) * gate_up[:, self._width :]
            ranked[rows, rank] = self._down[expert](inner) * weights[rows, rank, None]
        result = ranked[:, 0]
        for rank_index in range(1, self._top):
            result = result + ranked[:, rank_index]
        return residual + result


class Layer:
    """One decoder layer."""

    def __init__(self, config: TextConfig, index: int, load: Load) -> None:
        prefix = f"{TEXT}layers.{index}."
        eps = config.rms_norm_eps
        self._norm1 = Norm(load(prefix + "input_layernorm.weight"), eps)
        self._norm2 = Norm(load(prefix + "post_attention_layernorm.weight"), eps)
        self._attention = Attention(config, prefix, load)
        moe = config.moe[index]
        self._mlp = DenseMlp(prefix, load) if moe is None else MoeMlp(moe, prefix, load)

    def __call__(self, x: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """x (R, D), the residual stream -> the residual stream after this layer."""
        x = self._attention(self._norm1(x), x, step, memory)
        return self._mlp(self._norm2(x), x)

    def last(self, x: Tensor, step: Pass, memory: LayerMemory) -> Tensor:
        """x (R, D), a part of a prompt -> the residual stream after this layer, last row only, (1,
        D)."""
        x = self._attention.last(self._norm1(x), x, step, memory)
        return self._mlp(self._norm2(x), x)


class Decoder:
    """All layers, embedding and head.

    Args:
        config: shape of the decoder.
        checkpoint: where the tensors come from; each is read once.
        dtype: float32 or bfloat16, of weights, residual stream and memory.
        on_progress: called with the share of layers that are loaded, 0 to 1.
    """

    def __init__(
        self,
        config: TextConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        def load(name: str) -> Tensor:
            return checkpoint.tensor(name, dtype).to(device)

        self.dtype, self.device = dtype, device
        self._embedding = load(EMBEDDING)
        self._head = Linear(self._embedding if config.tied else load(HEAD))
        self._norm = Norm(load(NORM), config.rms_norm_eps)
        self._layers = []
        for index in range(config.num_layers):
            self._layers.append(Layer(config, index, load))
            on_progress((index + 1) / config.num_layers)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 (R,) -> (R, D), a new tensor."""
        return F.embedding(token_ids, self._embedding)

    def forward(self, step: Pass, cache: KeyValueCache) -> Tensor:
        """The hidden state after the last layer, before the final norm.

        (R, D) for answers; (1, D), the last row, for a part of a prompt. The keys and values of all
        rows are written to the cache.
        """
        x = step.hidden
        features = () if step.deepstack is None else step.deepstack.features
        final = len(self._layers) - 1
        for index, (layer, memory) in enumerate(zip(self._layers, cache.layers, strict=True)):
            if step.prompt and index == final and index >= len(features):
                return layer.last(x, step, memory)
            x = layer(x, step, memory)
            if step.deepstack is not None and index < len(features):
                x.index_add_(0, step.deepstack.rows, features[index])
        return x.narrow(0, step.prompt - 1, 1) if step.prompt else x

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) as `forward` returns it -> float32 (R, V)."""
        return self._head(self._norm(hidden)).float()
