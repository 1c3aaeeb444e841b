"""Trains a GPT within a fixed budget: the program under search, one file, to be read and edited from top to bottom.

The harness calls `train(run)`. Clock, order of the data and score are the harness's; all the rest is decided here.
"""

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adamw import adamw

# ----------------------------------------------------------------------------------------------------------------------
# Knobs. A search moves the constants that have a range in their comment. The others gained less in published runs; they
# are left to people and agents, who may change anything.
# ----------------------------------------------------------------------------------------------------------------------

# Model
DEPTH = 8  # in [1, 24] log: transformer layers
MODEL_DIM = 512  # in [32, 1024] log: width of the residual stream, before it is rounded to whole heads
HEAD_DIM = 128  # in {16, 32, 64, 128}: width of an attention head
MLP_RATIO = 4  # in [1, 8] log: hidden width of the MLP over the residual stream's
SEQ_LEN = 2048  # in {64, 128, 256, 512, 1024, 2048}: tokens of a training row, and the longest look back
WINDOW_PATTERN = "SSSL"  # in {"L", "SL", "SSSL", "XL", "XXXL", "XXXXL"}: layers look back SEQ_LEN (L), 1/2 (S), 1/8 (X)
VALUE_EMBEDS = True  # in {True, False}: every other layer adds an embedding of the token to its values
NGRAM_ROWS = 0  # in {0, 4096, 65536, 262144, 1048576}: rows of the hashed embeddings of the last few tokens; 0: none
NGRAMS = (2, 3, 4, 5)  # how many tokens; each length has its own part of the channels
SOFT_CAP = 15.0  # logits are squashed into ±SOFT_CAP
INIT_SCALE = 0.68  # standard deviation of the matrices that read the residual stream, times the root of its width
X0_INIT = 0.05  # how much of the token embedding each layer adds again, at first
FLOAT8 = True  # most products of the layers in 8 bits, where the card and its kernels can: faster, a little less exact
ROPE_BASE = 200000.0  # the rotary embedding's longest wavelength, over 2π
# Batch
# rule: TOTAL_BATCH_SIZE % SEQ_LEN == 0
# rule: DEVICE_BATCH_SIZE == 0 or TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * SEQ_LEN) == 0
TOTAL_BATCH_SIZE = 2**19  # in {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288}: tokens a step
DEVICE_BATCH_SIZE = 0  # rows at once; 0: the most that fit, as the harness finds
# Optimizer
LR_SCALE = 1.0  # in [0.25, 4.0] log: multiplies all learning rates
MATRIX_LR = 0.04  # in [0.01, 0.3] log: Muon, the matrices of the layers
EMBEDDING_LR = 0.6  # in [0.1, 3.0] log: Adam, token and value embeddings, at width 768
NGRAM_LR = 0.3  # Adam, the embeddings of the last few tokens, at width 768
UNEMBEDDING_LR = 0.004  # in [0.002, 0.1] log: Adam, the output matrix, at width 768
SCALAR_LR = 0.5  # Adam, the scalars of the residual stream
WEIGHT_DECAY = 0.2  # in [0.0, 0.5]: of the matrices, where it agrees with the update's sign; falls to 0
MUON_MOMENTUM = 0.95  # reached after MOMENTUM_WARMUP
MOMENTUM_WARMUP = 0.15  # share of the budget in which the momentum rises from 0.85
MUON_BETA2 = 0.95  # mean of the squares of Muon's updates, a neuron
UNEMBEDDING_DECAY = 0.01  # of the output matrix
EMBEDDING_DECAY = 0.001  # of the token embedding
VALUE_EMBED_DECAY = 0.003  # of the value embeddings
ADAM_BETA1 = 0.8  # mean of Adam's gradients
X0_BETA1 = 0.96  # the same for the scalars of the token embedding
ADAM_BETA2 = 0.95  # mean of their squares
# Schedule of the learning rates: up, flat, down
WARMUP_RATIO = 0.0  # in [0.0, 0.6]: share of the budget that goes up from 0
WARMDOWN_RATIO = 0.5  # in [0.0, 0.9]: share of the budget that goes down
FINAL_LR_FRAC = 0.0  # in [0.0, 1.0]: where it ends

# rule: WARMUP_RATIO + WARMDOWN_RATIO <= 1

HEADS = max(1, round(MODEL_DIM / HEAD_DIM))
WIDTH = HEADS * HEAD_DIM

# ----------------------------------------------------------------------------------------------------------------------
# What this machine can do
# ----------------------------------------------------------------------------------------------------------------------

HAS_TRITON = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def compiled(function):
    """Compiles a function for CUDA tensors and leaves it as it is for others: on a CPU that takes longer than it saves.

    Small functions on tensors, and not the whole model: layers of one shape share a graph, which is compiled once in a
    few seconds, and found again in the cache after an edit of anything else. The compiler is loaded at the first call:
    that takes seconds, and a card for which all kernels below are written never asks for it.
    """

    @functools.cache
    def fast():
        torch._dynamo.config.recompile_limit = 64  # one graph a shape of batch, with and without gradients
        return torch.compile(function, dynamic=False, fullgraph=True)

    @functools.wraps(function)
    def call(*inputs, **options):
        return (fast() if HAS_TRITON and inputs[0].is_cuda else function)(*inputs, **options)

    return call


@functools.cache
def has_hopper_kernels() -> bool:
    """Whether the kernels below that are written for Hopper run here; every one of them has a plain version."""
    hopper = HAS_TRITON and torch.cuda.get_device_capability()[0] == 9
    return hopper and importlib.util.find_spec("cudnn") is not None


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the arithmetic units know it; emulated on an older CPU it is four times slower than float32."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a layer, as plain functions of (B, T, …) tensors
# ----------------------------------------------------------------------------------------------------------------------

EPSILON = 1e-6  # the kernels below have it too


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),), eps=EPSILON)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """The linear map of a float32 weight (outputs, inputs), computed in x's precision."""
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of (B, T, H, D): turns the pairs (x[i], x[i + D/2])."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def ngram_rows(tokens: Tensor, rows: int) -> Tensor:
    """Hashes the n tokens that end at each place of (B, T) to a row, for every n of NGRAMS: int64 (B, T, len(NGRAMS)).

    Multiplicative hashing (Knuth, vol. 3, 6.4) of a polynomial in the tokens, in 64-bit arithmetic that overflows.
    """
    hashes = []
    for place, n in enumerate(NGRAMS):
        key = tokens + place
        for back in range(1, n):
            key = key * 0x2545F491 + F.pad(tokens, (back, 0))[:, : tokens.size(1)]
        key = key * -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number
        hashes.append((key >> 40) % rows)
    return torch.stack(hashes, dim=-1)


def plain_embed(
    tokens: Tensor, table: Tensor, places: Tensor | None, ngrams: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Normalised embeddings of tokens (B, T), (B, T, C): of the token itself, and of the last few.

    Each length of the last few has its own part of the channels, read at its own row of ngrams: places (B, T, parts).
    """
    x = F.embedding(tokens, table)
    if places is not None and ngrams is not None:
        parts = places.size(-1)
        own = places * parts + torch.arange(parts, device=tokens.device)
        x = x + F.embedding(own, ngrams.view(len(ngrams) * parts, -1)).flatten(-2)
    return norm(x).to(dtype)


def plain_add_norm(
    x: Tensor, other: Tensor | None, x0: Tensor | None, keep: Tensor | None, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream (B, T, C), mixes the token embedding in, and returns it, plain and normalised."""
    x = x if other is None else x + other
    if x0 is not None and keep is not None and add is not None:
        x = keep.to(x.dtype) * x + add.to(x.dtype) * x0
    return x, norm(x)


@compiled
def split_heads(
    qkv: Tensor, gates: Tensor | None, table: Tensor | None, tokens: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated and normalised, and values with their gated embedding: (B, T, H, D) each."""
    q, k, v = qkv.view(*tokens.shape, 3, HEADS, HEAD_DIM).unbind(2)
    if gates is not None and table is not None:
        v = v + gates.unsqueeze(-1) * F.embedding(tokens, table).to(v.dtype).view(v.shape)
    return norm(rotate(q, cos, sin)).to(v.dtype), norm(rotate(k, cos, sin)).to(v.dtype), v


@compiled
def plain_mlp(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two matrices with a squared ReLU between them (arXiv:2109.08668)."""
    return project(F.relu(project(h, up)).square(), down)


def plain_capped_logits(h: Tensor, unembed: Tensor) -> Tensor:
    """float32 logits (B, T, V), squashed into ±SOFT_CAP."""
    return SOFT_CAP * torch.tanh(project(h, unembed).float() / SOFT_CAP)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal softmax attention of (B, T, H, D) tensors: a token sees itself and the window - 1 tokens before it.

    Windows skip what they mask wherever FlashAttention 2 runs, from compute capability 8.0 on; elsewhere they do not.
    """
    B, T, H, D = q.shape
    across = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.is_cuda:
        mask = None if window >= T else visible(window, T, q.device)
        return F.scaled_dot_product_attention(*across, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    if window < T and torch.cuda.get_device_capability(q.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - torch 2.11

        ends = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
        rows = [t.reshape(B * T, H, D) for t in (q, k, v)]
        y = varlen_attn(rows[0], rows[1], rows[2], ends, ends, T, T, window_size=(window - 1, 0))
        assert isinstance(y, Tensor)
        return y.view(B, T, H, D)
    mask = None if window >= T else visible(window, T, q.device)
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(*across, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


SDPA_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the first that can run


@functools.cache
def visible(window: int, T: int, device: torch.device) -> Tensor:
    """Which token (row) sees which (column), bool (T, T)."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)[None, :]
    return (distance >= 0) & (distance < window)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: what torch.compile does not fuse. Each is an autograd.Function that does what plain functions above do; the
# functions at the end of this section choose. To change the arithmetic, change the plain one and drop the kernel.
# ----------------------------------------------------------------------------------------------------------------------

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportIncompatibleMethodOverride=false
if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def loss_kernel(logits, targets, losses, weight, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
        """One row's cross-entropy after the soft cap; its gradient times weight takes the place of the logits.

        No maximum is subtracted: no capped logit is above CAP.
        """
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        column = tl.arange(0, BLOCK)
        place, inside = logits + row * V + column, column < V
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        t = 2 / (1 + tl.exp(-2 / CAP * x)) - 1  # tanh(x / CAP)
        powers = tl.where(inside, tl.exp(CAP * t - CAP), 0.0)
        total, hit = tl.sum(powers), column == target
        tl.store(losses + row, CAP + tl.log(total) - CAP * tl.sum(tl.where(hit, t, 0.0)))
        slope = (powers / total - tl.where(hit, 1.0, 0.0)) * (1 - t * t)
        tl.store(place, (slope * weight).to(logits.dtype.element_ty), mask=inside)

    @triton.jit
    def soft_cap_kernel(logits, out, count, CAP: tl.constexpr, BLOCK: tl.constexpr):
        """float32 logits from bfloat16 ones, after the soft cap."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + place, place < count).to(tl.float32)
        tl.store(out + place, CAP * (2 / (1 + tl.exp(-2 / CAP * x)) - 1), place < count)

    @triton.jit(do_not_specialize=["parts"])
    def embed_kernel(
        tokens, table, places, ngrams, out, inverse, rows, parts, C: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """plain_embed; notes 1 / RMS of each row. Without ngrams parts is 0."""
        row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < C)
        y = tl.load(table + tl.load(tokens + row, row < rows, 0) * C + column, inside, 0.0)
        more = inside & (parts != 0)
        place = tl.load(places + row.to(tl.int64) * parts + column * parts // C, more, 0)
        y += tl.load(ngrams + place * C + column, more, 0.0)
        scale = tl.rsqrt(tl.sum(y * y, 1) / C + 1e-6)[:, None]
        tl.store(inverse + row, scale, row < rows)
        tl.store(out + row.to(tl.int64) * C + column, (y * scale).to(out.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=["parts"])
    def embed_backward_kernel(
        grad, out, inverse, tokens, places, grad_table, grad_ngrams, rows, parts, C: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Adds the gradients of both tables to what is there."""
        row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
        inside, place = (row < rows) & (column < C), row.to(tl.int64) * C + column
        g, y = tl.load(grad + place, inside, 0.0).to(tl.float32), tl.load(out + place, inside, 0.0).to(tl.float32)
        g = tl.load(inverse + row, row < rows, 0.0) * (g - y * (tl.sum(g * y, 1) / C)[:, None])
        tl.atomic_add(grad_table + tl.load(tokens + row, row < rows, 0) * C + column, g, inside, sem="relaxed")
        more = inside & (parts != 0)
        entry = tl.load(places + row.to(tl.int64) * parts + column * parts // C, more, 0) * C + column
        tl.atomic_add(grad_ngrams + entry, g, more, sem="relaxed")

    @triton.jit
    def descend_kernel(
        weights, update, factor, lr, decay, count, matrix, columns, BY_ROW: tl.constexpr, BLOCK: tl.constexpr
    ):
        """plain_descend of matrices that lie one behind the other, each of so many weights."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, neuron = place < count, place // columns
        if not BY_ROW:
            neuron = place // matrix * columns + place % columns
        w, u = tl.load(weights + place, inside, 0.0), tl.load(update + place, inside, 0.0).to(tl.float32)
        u *= tl.load(factor + neuron, inside, 0.0)
        tl.store(weights + place, w - lr * (u + tl.where(u * w > 0, decay * w, 0.0)), inside)

    # One kernel for all layers, what a layer lacks is masked: each variant would take most of a second to compile.
    @triton.jit(do_not_specialize=["keep", "add", "adds", "mixes", "heads"])
    def add_norm_kernel(
        x, other, x0, keep, add, out, h, h8, head, rows, adds, mixes, heads, FLOAT8: tl.constexpr, C: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """plain_add_norm; also the norm in 8 bits, and its first channels.

        What there is not has 0 among the last numbers.
        """
        row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
        place, inside = row.to(tl.int64) * C + column, (row < rows) & (column < C)
        mixed = inside & (mixes != 0)
        y = tl.load(x + place, inside, 0.0).to(tl.float32)
        y += tl.load(other + place, inside & (adds != 0), 0.0).to(tl.float32)
        y = tl.load(keep, mixes != 0, 1.0) * y
        y += tl.load(add, mixes != 0, 0.0) * tl.load(x0 + place, mixed, 0.0).to(tl.float32)
        tl.store(out + place, y.to(out.dtype.element_ty), inside & (adds + mixes != 0))
        y = (y * tl.rsqrt(tl.sum(y * y, 1) / C + 1e-6)[:, None]).to(h.dtype.element_ty)
        tl.store(h + place, y, inside)
        if FLOAT8:
            tl.store(h8 + place, y.to(tl.float8e4nv), inside)
        tl.store(head + row.to(tl.int64) * heads + column, y, inside & (column < heads))

    @triton.jit(do_not_specialize=["keep", "add", "heads", "has_out", "mixes", "has_x0"])
    def add_norm_backward_kernel(
        grad_out, grad_h, grad_head, grad_x0, out, x0, keep, add, grad_x, new_grad_x0, sums, rows, heads, has_out,
        mixes, has_x0, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradients of x (and other), of x0 on top of what later layers say, and two sums for keep and add."""
        row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
        place, inside = row.to(tl.int64) * C + column, (row < rows) & (column < C)
        mixed = inside & (mixes != 0)
        y, g = tl.load(out + place, inside, 0.0).to(tl.float32), tl.load(grad_h + place, inside, 0.0).to(tl.float32)
        g += tl.load(grad_head + row.to(tl.int64) * heads + column, inside & (column < heads), 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(y * y, 1) / C + 1e-6)[:, None]
        g = scale * (g - y * (scale * scale * (tl.sum(g * y, 1) / C)[:, None]))
        g += tl.load(grad_out + place, inside & (has_out != 0), 0.0).to(tl.float32)
        start = tl.load(x0 + place, mixed, 0.0).to(tl.float32)
        tl.store(sums + 2 * tl.program_id(0), tl.sum(g * y), mixes != 0)
        tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(g * start), mixes != 0)
        into = tl.load(add, mixes != 0, 0.0) * g
        into += tl.load(grad_x0 + place, mixed & (has_x0 != 0), 0.0).to(tl.float32)
        tl.store(new_grad_x0 + place, into.to(new_grad_x0.dtype.element_ty), mixed)
        g *= tl.load(keep, mixes != 0, 1.0)
        tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), inside)

    @triton.jit
    def heads_kernel(qkv, cos, sin, inverse, rows, T, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
        """Rotates and normalises queries and keys in place; notes 1 / RMS of each. A row is a head of a token."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row[:, None] < rows
        token, head = row // (2 * H), row % (2 * H)
        column = tl.arange(0, HALF)[None, :]
        place = qkv + (token.to(tl.int64) * (3 * H) + head)[:, None] * (2 * HALF) + column
        angle = (token % T)[:, None] * HALF + column
        c, s = tl.load(cos + angle, inside).to(tl.float32), tl.load(sin + angle, inside).to(tl.float32)
        left, right = tl.load(place, inside).to(tl.float32), tl.load(place + HALF, inside).to(tl.float32)
        one, two = left * c + right * s, right * c - left * s
        scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / (2 * HALF) + 1e-6)
        tl.store(inverse + row, scale, row < rows)
        tl.store(place, (one * scale[:, None]).to(qkv.dtype.element_ty), inside)
        tl.store(place + HALF, (two * scale[:, None]).to(qkv.dtype.element_ty), inside)

    @triton.jit
    def heads_backward_kernel(
        grad, qkv, cos, sin, inverse, rows, T, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
    ):
        """The gradient of heads_kernel, in place, from its results."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row[:, None] < rows
        token, head = row // (2 * H), row % (2 * H)
        column = tl.arange(0, HALF)[None, :]
        offset = (token.to(tl.int64) * (3 * H) + head)[:, None] * (2 * HALF) + column
        angle = (token % T)[:, None] * HALF + column
        c, s = tl.load(cos + angle, inside).to(tl.float32), tl.load(sin + angle, inside).to(tl.float32)
        one, two = tl.load(qkv + offset, inside).to(tl.float32), tl.load(qkv + offset + HALF, inside).to(tl.float32)
        g1, g2 = tl.load(grad + offset, inside).to(tl.float32), tl.load(grad + offset + HALF, inside).to(tl.float32)
        along = ((tl.sum(g1 * one, 1) + tl.sum(g2 * two, 1)) / (2 * HALF))[:, None]
        scale = tl.load(inverse + row, row < rows)[:, None]
        g1, g2 = (g1 - one * along) * scale, (g2 - two * along) * scale
        tl.store(grad + offset, (g1 * c - g2 * s).to(grad.dtype.element_ty), inside)
        tl.store(grad + offset + HALF, (g1 * s + g2 * c).to(grad.dtype.element_ty), inside)

    @triton.jit
    def values_kernel(
        qkv, gates, table, tokens, grad_gates, grad_table, rows, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
        BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """Adds the gated embedding of the token to the values in place; backward: from their gradient, that of both."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row[:, None] < rows
        token, head = row // H, row % H
        column = tl.arange(0, D)[None, :]
        place = qkv + (token.to(tl.int64) * (3 * H) + 2 * H + head)[:, None] * D + column
        entry = (tl.load(tokens + token, row < rows, 0) * (H * D) + head * D)[:, None] + column
        value, embedding = tl.load(place, inside, 0.0).to(tl.float32), tl.load(table + entry, inside, 0.0)
        gate = tl.load(gates + row, row < rows, 0.0).to(tl.float32)[:, None]
        if BACKWARD:
            tl.store(grad_gates + row, tl.sum(value * embedding, 1).to(grad_gates.dtype.element_ty), row < rows)
            tl.atomic_add(grad_table + entry, gate * value, inside, sem="relaxed")
        else:
            tl.store(place, (value + gate * embedding).to(qkv.dtype.element_ty), inside)

    @triton.jit
    def tile_of(number, tiles_m, tiles_n, GROUP: tl.constexpr):
        """Row and column of a tile, in an order in which neighbours share their rows in the cache."""
        first = number // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        return first + number % (GROUP * tiles_n) % size, number % (GROUP * tiles_n) // size

    @triton.jit
    def halves(x):
        """The left and the right half of a tile: stored one after the other they take half the shared memory."""
        return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))

    @triton.jit
    def float8_kernel(x, out, count, SCALE: tl.constexpr, BLOCK: tl.constexpr):
        """Numbers times SCALE in 8 bits; what is too large becomes the largest there is."""
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(x + place, place < count, 0.0) * SCALE
        tl.store(out + place, y.to(tl.float8e4nv), place < count)

    @triton.jit
    def float8_rows_kernel(x, out, scales, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """Each row in 8 bits, divided by a scale of its own that lets its largest number be the largest there is."""
        row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
        place, inside = row.to(tl.int64) * C + column, (row < rows) & (column < C)
        y = tl.load(x + place, inside, 0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(y), 1) / 448, 1e-30)[:, None]
        tl.store(scales + row, scale, row < rows)
        tl.store(out + place, (y / scale).to(tl.float8e4nv), inside)

    @triton.jit
    def store_relu2(
        sums, activation, out, out8, scales, row, column, M, SCALE: tl.constexpr, SHRINK: tl.constexpr,
        BACKWARD: tl.constexpr, FLOAT8: tl.constexpr,
    ):  # fmt: skip
        """The end of relu2_kernel for one half of a tile."""
        y = sums * SCALE
        if BACKWARD:
            y *= 2 * tl.sqrt(activation.to(tl.float32))
        else:
            y = tl.maximum(y, 0.0)
            y *= y
        if FLOAT8:
            out8.store([row, column], (y * SHRINK).to(tl.float8e4nv))
            if BACKWARD:
                place = row + tl.arange(0, y.shape[0])
                y *= tl.load(scales + place, place < M, 0.0)[:, None]
        out.store([row, column], y.to(tl.bfloat16))

    @triton.jit
    def relu2_kernel(
        a, b, activation, out, out8, scales, M, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, SCALE: tl.constexpr, SHRINK: tl.constexpr, PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr,
        FLOAT8: tl.constexpr,
    ):  # fmt: skip
        """Writes relu(a bᵀ · SCALE)²; backward: a bᵀ · SCALE · 2 √activation, the gradient before the squared ReLU.

        With FLOAT8 a and b (M, K and N, K) have 8 bits, and the result is also written in 8 bits, times SHRINK;
        backward the activation has 8 bits too, and the result in 16 bits is times the scales of a's rows.
        """
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        for number in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            m, n = tile_of(number, tiles_m, tiles_n, 8)
            sums = tl.zeros((BM, BN), tl.float32)
            for k in range(0, K, BK):
                sums = tl.dot(a.load([m * BM, k]), b.load([n * BN, k]).T, sums)
            left, right = halves(sums)
            one, two = left, right
            if BACKWARD:
                one, two = halves(activation.load([m * BM, n * BN]))
            store_relu2(left, one, out, out8, scales, m * BM, n * BN, M, SCALE, SHRINK, BACKWARD, FLOAT8)
            store_relu2(right, two, out, out8, scales, m * BM, n * BN + BN // 2, M, SCALE, SHRINK, BACKWARD, FLOAT8)


# What is multiplied by before it has 8 bits (e4m3: 2^-9 to 448), so that nothing is too large and little too small
WEIGHT_SCALE, HIDDEN_SCALE, INNER_SCALE = 64.0, 1 / 8, 1 / 32


def float8(weight: Tensor) -> Tensor:
    """WEIGHT_SCALE times a matrix in 8 bits."""
    out = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    float8_kernel[(triton.cdiv(weight.numel(), 1024),)](weight, out, weight.numel(), WEIGHT_SCALE, 1024)
    return out


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bits, divided by a scale for each row, and the scales."""
    (rows, columns), out = x.shape, torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    grid, sizes = row_grid(rows, columns)
    float8_rows_kernel[grid](x, out, scales, rows, **sizes)
    return out, scales


@functools.cache
def constant(value: float, device: torch.device, *shape: int) -> Tensor:
    """A float32 tensor of one value."""
    return torch.full(shape, value, device=device)


def product8(a: Tensor, b: Tensor, scale: float, scales: Tensor | None = None) -> Tensor:
    """The product a bᵀ · scale in bfloat16 of 8-bit matrices (M, K) and (N, K), and times scales (M, 1) of a's rows."""
    if scales is None:
        kind, one = F.ScalingType.TensorWise, constant(1.0, a.device, 1)
        other = constant(scale, a.device, 1)
    else:
        kind, one, other = F.ScalingType.RowWise, scales, constant(scale, a.device, 1, len(b))
    return F.scaled_mm(a, b.mT, one, kind, other, kind, output_dtype=torch.bfloat16, use_fast_accum=True)


class FusedLoss(torch.autograd.Function):
    """Mean cross-entropy of capped_logits(h, unembed), with its gradients, some thousand tokens at a time.

    Logits of all tokens never exist: they would be the largest tensor of a training by far.
    """

    CHUNK_LOGITS = 2**27

    @staticmethod
    def forward(ctx, h: Tensor, h8: Tensor | None, unembed: Tensor, targets: Tensor) -> Tensor:
        """Takes h (B, T, C), also in 8 bits, unembed (V, C) float32, targets (B, T); returns a 0-d float32 tensor."""
        rows, weight, targets = h.flatten(0, 1), unembed.to(h.dtype), targets.flatten()
        in8 = None if h8 is None or len(unembed) % 16 else (h8.flatten(0, 1), float8(unembed))
        (N, V), wants_grad = (len(rows), len(weight)), ctx.needs_input_grad[0]
        losses = torch.empty(N, device=h.device)
        grad_rows = torch.empty_like(rows) if wants_grad else None
        grad_weight = torch.zeros_like(unembed) if wants_grad else None
        size = max(1, FusedLoss.CHUNK_LOGITS // V)
        for begin in range(0, N, size):
            part = slice(begin, begin + size)
            logits = rows[part] @ weight.mT if in8 is None else product8(in8[0][part], in8[1], 1 / WEIGHT_SCALE)
            block = triton.next_power_of_2(V)
            loss_kernel[(len(logits),)](
                logits, targets[part], losses[part], 1 / N, V, SOFT_CAP, block, num_warps=min(32, max(4, block // 1024))
            )
            if grad_rows is not None and grad_weight is not None:
                torch.mm(logits, weight, out=grad_rows[part])
                grad_weight += torch.mm(logits.mT, rows[part], out_dtype=torch.float32)
        ctx.save_for_backward(grad_rows, grad_weight)
        ctx.shape = h.shape
        return losses.mean()

    @staticmethod
    def backward(ctx, grad):
        """The gradients were made on the way forward."""
        grad_rows, grad_weight = ctx.saved_tensors
        return (grad_rows * grad.to(grad_rows.dtype)).view(ctx.shape), None, grad_weight * grad, None


def given(tensor: Tensor | None, instead: Tensor | None) -> Tensor | None:
    """The tensor, or another of its kind where there is none: a kernel has to be given one that it does not look at."""
    return instead if tensor is None else tensor


def row_grid(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the sizes of a kernel whose programs take whole rows of that width, some 2048 numbers each."""
    block = triton.next_power_of_2(width)
    at_once = max(1, 2048 // block)
    return (triton.cdiv(rows, at_once),), {"C": width, "ROWS": at_once, "BLOCK": block}


class FusedEmbed(torch.autograd.Function):
    """plain_embed in one pass; its gradients are added up where they belong, without a tensor of them all."""

    @staticmethod
    def forward(
        ctx, tokens: Tensor, table: Tensor, places: Tensor | None, ngrams: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Takes tokens (B, T), table (V, C) float32, places (B, T, parts) and ngrams; returns (B, T, C)."""
        C, rows = table.size(1), tokens.numel()
        ctx.parts = 0 if places is None else places.size(-1)
        out, inverse = table.new_empty(*tokens.shape, C, dtype=dtype), table.new_empty(rows)
        ctx.grid, ctx.sizes = row_grid(rows, C)
        embed_kernel[ctx.grid](
            tokens, table, given(places, tokens), given(ngrams, table), out, inverse, rows, ctx.parts, **ctx.sizes
        )
        ctx.save_for_backward(out, inverse, tokens, table, places, ngrams)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Through the norm, and into the rows that were read."""
        out, inverse, tokens, table, places, ngrams = ctx.saved_tensors
        grad_table, grad_ngrams = torch.zeros_like(table), None if ngrams is None else torch.zeros_like(ngrams)
        embed_backward_kernel[ctx.grid](
            grad.contiguous(), out, inverse, tokens, given(places, tokens), grad_table, given(grad_ngrams, grad_table),
            len(inverse), ctx.parts, **ctx.sizes,
        )  # fmt: skip
        return None, grad_table, None, grad_ngrams, None


class FusedAddNorm(torch.autograd.Function):
    """plain_add_norm in one pass over its tensors, forward and backward.

    It also hands x0 on to the next layer, so that the layers' gradients of x0 are added up on the way back, and the
    first channels of the norm, for the gates.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        other: Tensor | None,
        x0: Tensor | None,
        keep: Tensor | None,
        add: Tensor | None,
        head: int,
        in8: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Takes x, other and x0 (B, T, C), keep and add 0-d float32.

        Returns x, its norm, (B, T, head) of it, x0, and the norm in 8 bits.
        """
        C, rows = x.size(-1), x.numel() // x.size(-1)
        ctx.adds, ctx.mixes, ctx.head = other is not None, x0 is not None, head
        out = torch.empty_like(x) if ctx.adds or ctx.mixes else x
        h, some = torch.empty_like(x), x.new_empty(*x.shape[:-1], head) if head else None
        h8 = torch.empty_like(x, dtype=torch.float8_e4m3fn) if in8 else None
        ctx.grid, ctx.sizes = row_grid(rows, C)
        one = x.new_ones((), dtype=torch.float32) if keep is None or add is None else None
        add_norm_kernel[ctx.grid](
            x, given(other, x), given(x0, x), given(keep, one), given(add, one), out, h, given(h8, h),
            given(some, x), rows, int(ctx.adds), int(ctx.mixes), head, h8 is not None, **ctx.sizes,
        )  # fmt: skip
        ctx.save_for_backward(out, x0, given(keep, one), given(add, one))
        ctx.set_materialize_grads(False)
        if h8 is not None:
            ctx.mark_non_differentiable(h8)
        return out, h, some, x0, h8

    @staticmethod
    def backward(ctx, grad_out, grad_h, grad_some, grad_x0, _):
        """With y = keep · x + add · x0, sums over x are had from those over y and x0, without reading x again."""
        out, x0, keep, add = ctx.saved_tensors
        grad_out, grad_h, grad_some = (g if g is None else g.contiguous() for g in (grad_out, grad_h, grad_some))
        grad_h = torch.zeros_like(out) if grad_h is None else grad_h  # an edit may leave one of them without use
        rows = out.numel() // out.size(-1)
        grad_x = torch.empty_like(out)
        sums = torch.empty(*ctx.grid if ctx.mixes else (1,), 2, device=out.device)
        new_grad_x0 = torch.empty_like(out) if ctx.mixes and grad_x0 is None else grad_x0
        add_norm_backward_kernel[ctx.grid](
            given(grad_out, out), grad_h, given(grad_some, out), given(grad_x0, out), out, given(x0, out), keep, add,
            grad_x, given(new_grad_x0, out), sums, rows, 0 if grad_some is None else ctx.head,
            int(grad_out is not None), int(ctx.mixes), int(grad_x0 is not None), **ctx.sizes,
        )  # fmt: skip
        grad_other = grad_x if ctx.adds else None
        if not ctx.mixes:
            return grad_x, grad_other, None, None, None, None, None
        with_y, with_x0 = sums.sum(0)
        grad_keep = (with_y - add * with_x0) / torch.where(keep == 0, torch.inf, keep)
        return grad_x, grad_other, new_grad_x0, grad_keep, with_x0, None, None


class FusedMLP(torch.autograd.Function):
    """plain_mlp with the squared ReLU inside the matrix products; keeps one hidden tensor instead of two."""

    @staticmethod
    def forward(ctx, h: Tensor, h8: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
        """Takes h (B, T, C), the same in 8 bits, up (R·C, C) and down (C, R·C) float32; returns (B, T, C)."""
        rows, ctx.float8 = h.flatten(0, 1), h8 is not None
        if h8 is None:
            up, down = up.to(h.dtype), down.to(h.dtype)
            hidden, _ = FusedMLP.launch(rows, up)
            ctx.save_for_backward(rows, hidden, hidden, up, down)
            return (hidden @ down.mT).view(h.shape)
        up, down = float8(up), float8(down)
        hidden, hidden8 = FusedMLP.launch(h8.flatten(0, 1), up)
        ctx.save_for_backward(rows, hidden, hidden8, up, down)
        return product8(hidden8, down, 1 / (HIDDEN_SCALE * WEIGHT_SCALE)).view(h.shape)

    @staticmethod
    def backward(ctx, grad):
        """Through the squared ReLU, whose slope is 2 √hidden: read in 8 bits, where it has them, since that is less."""
        rows, hidden, activation, up, down = ctx.saved_tensors
        shape, grad = grad.shape, grad.flatten(0, 1)
        down = down.mT.contiguous()
        if ctx.float8:
            grad8, scales = float8_rows(grad)
            inner, inner8 = FusedMLP.launch(grad8, down, activation, scales)
            grad_rows = product8(inner8, up.mT.contiguous(), 1 / (INNER_SCALE * WEIGHT_SCALE), scales)
        else:
            inner, _ = FusedMLP.launch(grad, down, activation)
            grad_rows = inner @ up
        grad_down = torch.mm(grad.mT, hidden, out_dtype=torch.float32)
        grad_up = torch.mm(inner.mT, rows, out_dtype=torch.float32)
        return grad_rows.view(shape), None, grad_up, grad_down

    @staticmethod
    def launch(
        a: Tensor, b: Tensor, activation: Tensor | None = None, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """relu2_kernel on as many programs as the card has processors; the result, and in 8 bits if a is."""
        backward, in8 = activation is not None, a.dtype == torch.float8_e4m3fn
        (M, K), N = a.shape, b.size(0)
        out = torch.empty(M, N, device=a.device, dtype=torch.bfloat16)
        out8 = torch.empty_like(out, dtype=a.dtype) if in8 else out
        BM, BN = 128, 256
        # so many columns at a time, and so many tiles on their way, as a processor's memory holds
        BK, stages = (128, 3) if in8 else (32, 5) if backward else (64, 3)
        half = TensorDescriptor.from_tensor(out, [BM, BN // 2])
        scale, shrink = 1 / WEIGHT_SCALE if in8 else 1.0, INNER_SCALE if backward else HIDDEN_SCALE
        if in8 and backward:
            scale *= HIDDEN_SCALE**-0.5  # the activation is that much smaller
        programs = torch.cuda.get_device_properties(a.device).multi_processor_count
        relu2_kernel[(programs,)](
            TensorDescriptor.from_tensor(a, [BM, BK]),
            TensorDescriptor.from_tensor(b, [BN, BK]),
            half if activation is None else TensorDescriptor.from_tensor(activation, [BM, BN]),
            half, TensorDescriptor.from_tensor(out8, [BM, BN // 2]), given(scales, a),
            M, N, K, BM, BN, BK, scale, shrink, programs, backward, in8, num_stages=stages, num_warps=8,
        )  # fmt: skip
        return out, out8


class Float8Projection(torch.autograd.Function):
    """A projection, forward in 8 bits: its gradients are those of the matrices as they are."""

    @staticmethod
    def forward(ctx, h: Tensor, h8: Tensor, weight: Tensor) -> Tensor:
        """Takes h (B, T, C), the same in 8 bits, weight (outputs, C) float32; returns (B, T, outputs)."""
        ctx.save_for_backward(h, weight)
        return product8(h8.flatten(0, 1), float8(weight), 1 / WEIGHT_SCALE).view(*h.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        """Two products in bfloat16."""
        h, weight = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        grad_weight = torch.mm(grad.mT, h.flatten(0, 1), out_dtype=torch.float32)
        return (grad @ weight.to(grad.dtype)).view(h.shape), None, grad_weight


class FusedAttention(torch.autograd.Function):
    """attention(*split_heads(…)) in place: queries, keys and values stay where the projection wrote them.

    cuDNN's own graphs, because SDPA's cuDNN backend has no windows: for 256 of 2048 tokens 1.3 ms instead of the 1.8 of
    FlashAttention 2 and the 1.7 of FlexAttention, for 1024 2.1 ms instead of 3.2 and 2.7 (docs/LOG.md).
    """

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        gates: Tensor | None,
        table: Tensor | None,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        window: int,
    ) -> Tensor:
        """Overwrites qkv (B, T, 3C) and returns (B, T, C).

        gates (B, T, H), table (V, C) float32, tokens (B, T), cos and sin (T, 1, D/2).
        """
        B, T = tokens.shape
        rows = B * T * 2 * HEADS
        inverse = torch.empty(rows, device=qkv.device)
        heads_kernel[(triton.cdiv(rows, 32),)](qkv, cos, sin, inverse, rows, T, HEADS, HEAD_DIM // 2, 32)
        if gates is not None and table is not None:
            gates = gates.contiguous()
            values_kernel[(triton.cdiv(rows // 2, 32),)](
                qkv, gates, table, tokens, gates, table, rows // 2, HEADS, HEAD_DIM, 32, False
            )
        graphs = CudnnAttention.of(B, T, window, ctx.needs_input_grad[0])
        y, log_sums = graphs.forward(qkv)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(qkv, y, log_sums, inverse, gates, table, tokens, cos, sin)
            ctx.graphs = graphs
        return y.view(B, T, WIDTH)

    @staticmethod
    def backward(ctx, grad_y):
        """Through cuDNN, the values' embedding, and rotation and norm."""
        qkv, y, log_sums, inverse, gates, table, tokens, cos, sin = ctx.saved_tensors
        grad = ctx.graphs.backward(qkv, y, log_sums, grad_y.contiguous())
        rows = len(inverse)
        grad_gates = grad_table = None
        if gates is not None:
            grad_gates, grad_table = torch.empty_like(gates), torch.zeros_like(table)
            values_kernel[(triton.cdiv(rows // 2, 32),)](
                grad, gates, table, tokens, grad_gates, grad_table, rows // 2, HEADS, HEAD_DIM, 32, True
            )
        heads_backward_kernel[(triton.cdiv(rows, 32),)](
            grad, qkv, cos, sin, inverse, rows, tokens.size(1), HEADS, HEAD_DIM // 2, 32
        )
        return grad, grad_gates, grad_table, None, None, None, None


class CudnnAttention:
    """cuDNN's graphs of a forward and a backward pass on (B, T, 3, H, D), for one shape and one window.

    cuDNN compiles a kernel for about a second each; `prepare` does so for all windows at once, in threads. It does so
    in the root folder: the driver keeps what it compiled, and does not find it again from another folder.
    """

    built: ClassVar[dict[tuple[int, int, int, bool], "CudnnAttention"]] = {}

    @staticmethod
    def prepare(B: int, T: int, windows: Iterable[int], wants_grad: bool = True) -> None:
        """Builds the graphs of a shape that are not there yet."""
        keys = {(B, T, min(window, T), wants_grad) for window in windows} - CudnnAttention.built.keys()
        with contextlib.chdir("/"), ThreadPoolExecutor(max_workers=4) as pool:
            CudnnAttention.built.update(zip(keys, pool.map(lambda key: CudnnAttention(*key), keys), strict=True))

    @staticmethod
    def of(B: int, T: int, window: int, wants_grad: bool) -> "CudnnAttention":
        """The graphs of a shape and a window."""
        window = min(window, T)
        if (B, T, window, wants_grad) not in CudnnAttention.built:
            CudnnAttention.prepare(B, T, [window], wants_grad)
        return CudnnAttention.built[B, T, window, wants_grad]

    def __init__(self, B: int, T: int, window: int, wants_grad: bool):
        self.shape = B, T, HEADS, HEAD_DIM
        self.handle = self.cudnn().create_handle()
        dim = [B, HEADS, T, HEAD_DIM]
        packed = [T * 3 * WIDTH, HEAD_DIM, 3 * WIDTH, 1]
        plain = [T * WIDTH, HEAD_DIM, WIDTH, 1]
        stats = [B, HEADS, T, 1], [HEADS * T, T, 1, 1]
        band: dict[str, Any] = {"attn_scale": HEAD_DIM**-0.5, "use_causal_mask": True}
        if window < T:
            cudnn = self.cudnn()
            band = {"attn_scale": HEAD_DIM**-0.5, "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT}
            band |= {"diagonal_band_right_bound": 0, "diagonal_band_left_bound": window}
        graph = self.graph()
        q, k, v = (graph.tensor(dim=dim, stride=packed) for _ in range(3))
        y, log_sums = graph.sdpa(q=q, k=k, v=v, is_inference=not wants_grad, **band)
        y.set_output(True).set_dim(dim).set_stride(plain)
        self.forward_graph, self.forward_places = graph, (q, k, v, y)
        if wants_grad:
            log_sums.set_output(True).set_data_type(self.cudnn().data_type.FLOAT)
            self.forward_places = (q, k, v, y, log_sums)
            back = self.graph()
            q, k, v = (back.tensor(dim=dim, stride=packed) for _ in range(3))
            y, grad_y = (back.tensor(dim=dim, stride=plain) for _ in range(2))
            log_sums = back.tensor(dim=stats[0], stride=stats[1], data_type=self.cudnn().data_type.FLOAT)
            grads = back.sdpa_backward(q=q, k=k, v=v, o=y, dO=grad_y, stats=log_sums, **band)
            for grad in grads:
                grad.set_output(True).set_dim(dim).set_stride(packed)
            self.backward_graph, self.backward_places = back, (q, k, v, y, log_sums, grad_y, *grads)
            back.build([self.cudnn().heur_mode.A])
        graph.build([self.cudnn().heur_mode.A])

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor | None]:
        """The attention (B, T, H, D), and the logarithms of the softmax's sums (B, H, T, 1)."""
        B, T, H, D = self.shape
        y = torch.empty(B, T, H, D, device=qkv.device, dtype=qkv.dtype)
        log_sums = torch.empty(B, H, T, 1, device=qkv.device)
        tensors = (*qkv.view(B, T, 3, H, D).unbind(2), y, log_sums)
        self.run(self.forward_graph, self.forward_places, tensors)
        return y, log_sums

    def backward(self, qkv: Tensor, y: Tensor, log_sums: Tensor, grad_y: Tensor) -> Tensor:
        """The gradient of qkv, in its layout."""
        B, T, H, D = self.shape
        grad = torch.empty_like(qkv)
        tensors = (
            *qkv.view(B, T, 3, H, D).unbind(2), y, log_sums, grad_y, *grad.view(B, T, 3, H, D).unbind(2),
        )  # fmt: skip
        self.run(self.backward_graph, self.backward_places, tensors)
        return grad

    def run(self, graph, places, tensors) -> None:
        """Executes a graph on the current stream."""
        workspace = torch.empty(max(1, graph.get_workspace_size()), device=tensors[0].device, dtype=torch.uint8)
        pointers = {place: tensor.data_ptr() for place, tensor in zip(places, tensors, strict=False)}
        self.cudnn().set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pointers, workspace.data_ptr(), handle=self.handle)

    def graph(self):
        """An empty graph: bfloat16 tensors, float32 arithmetic."""
        types = self.cudnn().data_type
        return self.cudnn().pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )

    @staticmethod
    @functools.cache
    def cudnn() -> Any:
        """The module, loaded when it is needed."""
        import cudnn  # noqa: PLC0415

        return cudnn


def embed(tokens: Tensor, table: Tensor, ngrams: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Normalised embeddings of tokens (B, T), and of the last few at each place where there are ngrams: (B, T, C)."""
    places = None if ngrams is None else ngram_rows(tokens, len(ngrams))
    fused = tokens.is_cuda and HAS_TRITON
    return (FusedEmbed.apply if fused else plain_embed)(tokens, table, places, ngrams, dtype)


def add_norm(
    x: Tensor,
    other: Tensor | None,
    x0: Tensor | None = None,
    keep: Tensor | None = None,
    add: Tensor | None = None,
    head: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Adds to the residual stream, mixes x0 in, and normalises.

    Returns x, its norm, the norm's first channels, x0, and the norm in 8 bits where products want it.
    """
    if x.is_cuda and HAS_TRITON:
        in8 = FLOAT8 and has_hopper_kernels() and WIDTH % 16 == 0  # a rule of products in 8 bits
        return FusedAddNorm.apply(x, other, x0, keep, add, head, in8)
    x, h = plain_add_norm(x, other, x0, keep, add)
    return x, h, h[..., :head], x0, None


def attend(
    qkv: Tensor,
    gates: Tensor | None,
    table: Tensor | None,
    tokens: Tensor,
    rotary: tuple[Tensor, Tensor],
    window: int,
) -> Tensor:
    """The attention of a layer from its projections (B, T, 3C), which it may overwrite, to (B, T, C)."""
    if qkv.is_cuda and has_hopper_kernels():
        return FusedAttention.apply(qkv, gates, table, tokens, *rotary, window)
    return attention(*split_heads(qkv, gates, table, tokens, *rotary), window).flatten(2)


def project_norm(h: Tensor, h8: Tensor | None, weight: Tensor) -> Tensor:
    """The projection of a norm, which may be there in 8 bits too."""
    return project(h, weight) if h8 is None else Float8Projection.apply(h, h8, weight)


def mlp(h: Tensor, h8: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    """The MLP of a layer, (B, T, C) to (B, T, C)."""
    return FusedMLP.apply(h, h8, up, down) if h.is_cuda and has_hopper_kernels() else plain_mlp(h, up, down)


def capped_logits(h: Tensor, unembed: Tensor) -> Tensor:
    """float32 logits (B, T, V), squashed into ±SOFT_CAP; without gradients where there is a kernel."""
    if not h.is_cuda or not HAS_TRITON or torch.is_grad_enabled():
        return plain_capped_logits(h, unembed)
    logits = project(h, unembed)
    out, count = torch.empty_like(logits, dtype=torch.float32), logits.numel()
    soft_cap_kernel[(triton.cdiv(count, 4096),)](logits, out, count, SOFT_CAP, 4096)
    return out


def cross_entropy(h: Tensor, h8: Tensor | None, unembed: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the capped logits of h (B, T, C) against targets (B, T)."""
    if h.is_cuda and HAS_TRITON:
        return FusedLoss.apply(h, h8, unembed, targets)
    return F.cross_entropy(plain_capped_logits(h, unembed).flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, *, std: float) -> nn.Linear:
    """A matrix without bias, its weights uniform with this standard deviation."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(layer.weight, -std * math.sqrt(3), std * math.sqrt(3))
    return layer


# Every layer starts as the identity: the matrices that write into the residual stream are zero.
STD = INIT_SCALE * WIDTH**-0.5


class Block(nn.Module):
    """One layer: attention with rotary positions, normalised queries and keys, gated value embeddings; then an MLP."""

    GATE_WIDTH = min(32, WIDTH)  # channels of the residual stream that a head's gate looks at

    def __init__(self, has_value_embed: bool):
        super().__init__()
        self.qkv = linear(WIDTH, 3 * WIDTH, std=STD)
        self.gate = linear(self.GATE_WIDTH, HEADS, std=0.0) if has_value_embed else None
        self.out = linear(WIDTH, WIDTH, std=0.0)
        self.up = linear(WIDTH, MLP_RATIO * WIDTH, std=STD)
        self.down = linear(MLP_RATIO * WIDTH, WIDTH, std=0.0)

    def forward(self, x: Tensor, mlp_out: Tensor | None, x0: Tensor, scales, values, rotary, window: int):
        """Maps the residual stream and what is still to be added to it, (B, T, C) each, to the same of the next layer.

        Args:
            x: The residual stream.
            mlp_out: What the last layer's MLP adds to it.
            x0: The token embedding.
            scales: How much of x is kept, and how much of x0 is added; 0-d.
            values: The layer's value embedding (V, C) or None, and the tokens (B, T).
            rotary: Cosines and sines.
            window: How far the layer looks back.
        """
        table, tokens = values
        x, h, some, passed, h8 = add_norm(x, mlp_out, x0, *scales, head=0 if self.gate is None else self.GATE_WIDTH)
        gates = None if self.gate is None else 2 * torch.sigmoid(project(some, self.gate.weight))
        y = attend(project_norm(h, h8, self.qkv.weight), gates, table, tokens, rotary, window)
        x, h, _, _, h8 = add_norm(x, project(y, self.out.weight))
        return x, mlp(h, h8, self.up.weight, self.down.weight), passed


class GPT(nn.Module):
    """Maps tokens (B, T) to logits (B, T, V), or with targets to the mean cross-entropy.

    A full window is SEQ_LEN tokens even in longer rows, so the evaluation never asks for a distance that training did
    not see.
    """

    def __init__(self, vocab_size: int, longest_row: int, device: torch.device):
        super().__init__()
        self.depth, self.dtype = DEPTH, compute_dtype(device)
        # every other layer, the last one included (arXiv:2410.17897)
        value_layers = [i for i in range(DEPTH) if VALUE_EMBEDS and i % 2 == (DEPTH - 1) % 2]
        with device:
            self.embed = nn.Embedding(vocab_size, WIDTH)  # normal, standard deviation 1
            self.ngrams = nn.Parameter(torch.zeros(NGRAM_ROWS, WIDTH)) if NGRAM_ROWS else None
            self.value_embeds = nn.ParameterDict(
                {str(i): linear(WIDTH, vocab_size, std=STD).weight for i in value_layers}
            )
            self.blocks = nn.ModuleList(Block(i in value_layers) for i in range(DEPTH))
            self.unembed = linear(WIDTH, vocab_size, std=0.001)
            self.residual_scale = nn.Parameter(torch.ones(DEPTH))
            self.x0_scale = nn.Parameter(torch.full((DEPTH,), X0_INIT))
        pattern = [WINDOW_PATTERN[i % len(WINDOW_PATTERN)] for i in range(DEPTH - 1)] + ["L"]
        self.windows = [SEQ_LEN // {"L": 1, "S": 2, "X": 8}[letter] for letter in pattern]
        self.rotaries = {T: self.rotary(T, device) for T in (SEQ_LEN, longest_row)}
        # forward and backward; attention as if nothing were masked inside the window, which is how MFU is quoted
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        self.flops_per_token = 6 * weights + 12 * WIDTH * sum(min(window, SEQ_LEN) for window in self.windows)

    def rotary(self, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, (T, 1, HEAD_DIM / 2)."""
        frequency = ROPE_BASE ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
        angle = torch.outer(torch.arange(T, device=device).float(), frequency).unsqueeze(1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Maps tokens (B, T) to float32 logits (B, T, V), or to a loss."""
        T, tokens = tokens.size(1), tokens.contiguous()  # the kernels read them one after the other
        if T not in self.rotaries:
            self.rotaries[T] = self.rotary(T, tokens.device)
        x = x0 = embed(tokens, self.embed.weight, self.ngrams, self.dtype)
        mlp_out = None
        scales = zip(self.residual_scale.unbind(), self.x0_scale.unbind(), strict=True)
        for i, (block, scale) in enumerate(zip(self.blocks, scales, strict=True)):
            values = self.value_embeds.get(str(i)), tokens
            x, mlp_out, x0 = block(x, mlp_out, x0, scale, values, self.rotaries[T], self.windows[i])
        _, h, _, _, h8 = add_norm(x, mlp_out)  # normalised for the output matrix
        if targets is None:
            return capped_logits(h, self.unembed.weight)
        return cross_entropy(h, h8, self.unembed.weight, targets)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer
# ----------------------------------------------------------------------------------------------------------------------

# Odd polynomials a·x + b·x³ + c·x⁵ that drive singular values to 1, best for each iteration: arXiv:2505.16932. As used
# for bfloat16: widened by 2%, so that a value which rounding pushed over 1 does not diverge.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(G: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix of G (N, rows, columns): same singular vectors, singular values near 1.

    Computed in dtype, and returned in it.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def plain_descend(W: Tensor, update: Tensor, factor: Tensor, lr: float, decay: float) -> None:
    """Takes an update times its factor from the weights (N, rows, columns), in place; decays what it makes smaller."""
    update = update * factor
    W.sub_(lr * (update + decay * W * (update * W > 0)))


def descend(W: Tensor, update: Tensor, factor: Tensor, lr: float, decay: float) -> None:
    """plain_descend, in one pass on a card: it touches all weights of the layers at each step."""
    if not W.is_cuda or not HAS_TRITON:
        return plain_descend(W, update, factor, lr, decay)
    grid, columns = (triton.cdiv(W.numel(), 1024),), W.size(-1)
    sizes = W.numel(), W[0].numel(), columns
    descend_kernel[grid](W, update.contiguous(), factor, lr, decay, *sizes, factor.size(-1) == 1, 1024)


def muon_update(
    W: Tensor,
    G: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: float,
    momentum: float,
    decay: float,
    dtype: torch.dtype,
) -> None:
    """One step of Muon on matrices of one shape, in place.

    Nesterov momentum, orthogonalised; evened out between neurons by a running mean of their squares (NorMuon,
    arXiv:2510.05491); decay only where it goes the update's way (cautious, arXiv:2411.16085).

    Args:
        W: Weights (N, rows, columns).
        G: Their gradients.
        mean: Of the gradients.
        square: Of the updates, one number a neuron: (N, rows, 1), or (N, 1, columns) for wide matrices.
        lr: Length of the step.
        momentum: Share of `mean` that stays.
        decay: Of the weights, times lr.
        dtype: Of the orthogonalisation.
    """
    mean.lerp_(G, 1 - momentum)
    update = orthogonalise(G.lerp(mean, momentum), dtype)
    across = -1 if square.size(-1) == 1 else -2
    size = torch.linalg.vector_norm(update, dim=across, keepdim=True, dtype=torch.float32).square()  # of each neuron's
    square.lerp_(size / update.size(across), 1 - MUON_BETA2)
    factor = square.clamp_min(1e-10).rsqrt()
    # the whole update stays as long as it was
    whole, evened = (x.sum(dim=(-2, -1), keepdim=True) for x in (size, size * factor.square()))
    factor = factor * (whole / evened.clamp_min(1e-20)).sqrt()
    descend(W, update, factor, lr, decay)


class Optimizer:
    """Muon for the matrices of the layers, all of one shape in one call, and AdamW for everything else."""

    def __init__(self, model: GPT, device: torch.device):
        width = (WIDTH / 768) ** -0.5  # Adam's rates were tuned at width 768
        self.adam = [  # learning rate, decay, beta1, parameters
            (EMBEDDING_LR * width, EMBEDDING_DECAY, ADAM_BETA1, [model.embed.weight]),
            (EMBEDDING_LR * width, VALUE_EMBED_DECAY, ADAM_BETA1, list(model.value_embeds.parameters())),
            (NGRAM_LR * width, EMBEDDING_DECAY, ADAM_BETA1, [] if model.ngrams is None else [model.ngrams]),
            (UNEMBEDDING_LR * width, UNEMBEDDING_DECAY, ADAM_BETA1, [model.unembed.weight]),
            (SCALAR_LR * 0.01, 0.0, ADAM_BETA1, [model.residual_scale]),  # it multiplies through all layers
            (SCALAR_LR, 0.0, X0_BETA1, [model.x0_scale]),
        ]
        self.moments = {  # two means and the number of steps
            p: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=device))
            for *_, parameters in self.adam
            for p in parameters
        }
        self.muon = [MatrixBank(parameters, shape) for shape, parameters in matrices_by_shape(model).items()]
        self.dtype = compute_dtype(device)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Updates all parameters from their gradients, with the rates of this progress, and clears the gradients."""
        scale = lr_scale(progress)
        for lr, decay, beta1, parameters in self.adam:
            used = [p for p in parameters if p.grad is not None]  # an edit may leave a parameter without use
            gradients, moments = [p.grad for p in used], [self.moments[p] for p in used]
            means, squares, steps = ([one[i] for one in moments] for i in range(3))
            rates = {"lr": lr * scale, "beta1": beta1, "beta2": ADAM_BETA2, "weight_decay": decay, "eps": 1e-10}
            # the function, because the class loads torch's compiler
            adamw(used, gradients, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, **rates)
            for p in used:
                p.grad = None
        for bank in self.muon:
            rates = {"lr": MATRIX_LR * scale * bank.lr_factor, "decay": WEIGHT_DECAY * (1 - progress)}
            momenta = {"momentum": momentum(progress), "dtype": self.dtype}
            muon_update(bank.weights, bank.gradients, bank.mean, bank.square, **rates, **momenta)
            bank.gradients.zero_()


def matrices_by_shape(model: GPT) -> dict[tuple[int, int], list[nn.Parameter]]:
    """The matrices of the layers by their shape; queries, keys and values are three matrices in one parameter."""
    fused = {id(block.qkv.weight) for block in model.blocks if isinstance(block, Block)}
    matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
    for p in model.blocks.parameters():
        shape = (WIDTH, WIDTH) if id(p) in fused else (p.size(0), p.size(1))
        matrices.setdefault(shape, []).append(p)
    return matrices


class MatrixBank:
    """Matrices of one shape (rows, columns), moved into one tensor (N, rows, columns), and so their gradients."""

    def __init__(self, parameters: list[nn.Parameter], shape: tuple[int, int]):
        rows, columns = shape
        self.weights = torch.cat([p.detach().view(-1, rows, columns) for p in parameters])
        self.gradients, self.mean = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.square = self.weights.new_zeros(
            (len(self.weights), rows, 1) if rows >= columns else (len(self.weights), 1, columns)
        )
        self.lr_factor = (
            max(1.0, rows / columns) ** 0.5
        )  # so that a tall matrix changes its outputs as much as a square one
        sizes = [p.numel() // (rows * columns) for p in parameters]
        for p, weights, gradients in zip(
            parameters, self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            p.data, p.grad = weights.view_as(p), gradients.view_as(p)  # backward passes add to it in place


def lr_scale(progress: float) -> float:
    """The trapezoid: from 0 up to LR_SCALE, flat, down to FINAL_LR_FRAC of it."""
    up = progress / WARMUP_RATIO if progress < WARMUP_RATIO else 1.0
    left = (1 - progress) / WARMDOWN_RATIO if progress > 1 - WARMDOWN_RATIO else 1.0
    return LR_SCALE * up * (FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * left)


def momentum(progress: float) -> float:
    """Muon's momentum: low at first, when old gradients point elsewhere."""
    share = min(1.0, progress / MOMENTUM_WARMUP) if MOMENTUM_WARMUP else 1.0
    return min(0.85, MUON_MOMENTUM) * (1 - share) + MUON_MOMENTUM * share


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train(run) -> GPT:
    """Trains until the budget is spent; returns the model."""
    torch.set_float32_matmul_precision("high")
    model = GPT(run.vocab_size, run.row_tokens, run.device)
    optimizer = Optimizer(model, run.device)
    rows = run.micro_batch(
        model, total_tokens=TOTAL_BATCH_SIZE, seq_len=SEQ_LEN, at_most=DEVICE_BATCH_SIZE or None, loss=model
    )
    micro_batches = TOTAL_BATCH_SIZE // (rows * SEQ_LEN)
    if run.device.type == "cuda" and has_hopper_kernels():
        CudnnAttention.prepare(rows, SEQ_LEN, model.windows)
    while not run.done:
        total = torch.zeros((), device=run.device)
        for _ in range(micro_batches):
            x, y = run.batch(rows, SEQ_LEN)
            loss = model(x, y) / micro_batches
            loss.backward()
            total += loss.detach()
        optimizer.step(run.progress)
        run.step(total)
    return model
