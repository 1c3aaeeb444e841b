"""Stands in for FlashAttention's function with the kernels that torch brings along; for programs that ask `kernels`.

It does not look for the fastest kernel of a machine: it calls those that trainer/train.py calls. It is a module of its
own because torch.compile finds a function's globals by its module's name, and a program's own `__main__` hides ours.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BLOCK = 128  # of FlexAttention; a row that is no multiple of it takes a mask of bools
HALVINGS = (2, 4, 8, 16)  # windows of published programs, as a share of the row: their masks are made beforehand

# The order of trainer/train.py: on Hopper cuDNN's kernel is the fastest.
SDPA_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
    SDPA_ORDER.insert(0, SDPBackend.CUDNN_ATTENTION)

_BLOCK_MASKS: dict[int, dict[int, Any]] = {}  # by the row's length, then by how far back a token looks


def get_kernel(*_: Any, **__: Any) -> SimpleNamespace:
    """What `kernels.get_kernel(name)` returns, as far as a caller of FlashAttention needs it."""
    return SimpleNamespace(flash_attn_interface=sys.modules[__name__])


def flash_attn_func(  # noqa: PLR0917  # FlashAttention's signature
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Causal attention, by FlashAttention's signature and meaning.

    Args:
        q: (B, T, H, D).
        k: (B, T, H or a divisor of it, D).
        v: As k.
        softmax_scale: Of the products; None for 1 / √D.
        causal: Has to be True.
        window_size: The token at i sees those from i - left to itself; left below 0 means all.

    Returns:
        (B, T, H, D), not contiguous.

    Raises:
        ValueError: Attention that is not causal.
    """
    if not causal:
        raise ValueError("causal=False: only causal attention is built; pass causal=True")
    if q.is_cuda and v.dtype == torch.float32:
        v = v.bfloat16()  # FlashAttention knows no float32
    T, left = q.size(1), window_size[0]
    is_grouped = q.size(2) != k.size(2)
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    if not 0 <= left < T - 1:
        y = full(q, k, v, scale=softmax_scale, is_grouped=is_grouped)
    elif q.is_cuda and T % BLOCK == 0 and torch.compiler.is_compiling():  # eager it would hold all scores in memory
        y = windowed(q, k, v, left, scale=softmax_scale, is_grouped=is_grouped)
    else:
        y = masked(q, k, v, left, scale=softmax_scale, is_grouped=is_grouped)
    return y.transpose(1, 2)


def full(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, is_grouped: bool = False) -> Tensor:
    """Every token sees all before it: SDPA's causal kernels, on (B, H, T, D)."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, left: int, *, scale: float | None = None, is_grouped: bool = False
) -> Tensor:
    """FlexAttention on (B, H, T, D), which skips the blocks outside the window."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415 - a second

    T = q.size(2)
    if T not in _BLOCK_MASKS or left not in _BLOCK_MASKS[T]:
        make_block_mask(T, left, q.device)
    y: Any = flex_attention(q, k, v, block_mask=_BLOCK_MASKS[T][left], scale=scale, enable_gqa=is_grouped)
    return y


def masked(
    q: Tensor, k: Tensor, v: Tensor, left: int, *, scale: float | None = None, is_grouped: bool = False
) -> Tensor:
    """SDPA with a mask on (B, H, T, D): runs everywhere and skips nothing."""
    places = torch.arange(q.size(2), device=q.device)
    mask = _visible(places[:, None], places[None, :], left)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_grouped)


def make_block_masks(T: int, device: torch.device) -> None:
    """Makes the masks that a program is likely to ask for, so that its compiled graph has no break for them."""
    for share in HALVINGS:
        if T % BLOCK == 0 and T // share:
            make_block_mask(T, T // share, device)


def _make_block_mask(T: int, left: int, device: torch.device) -> None:
    """Makes the mask of a window and keeps it."""
    from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415

    mask = create_block_mask(lambda b, h, q, k: _visible(q, k, left), None, None, T, T, device=device)
    _BLOCK_MASKS.setdefault(T, {})[left] = mask


make_block_mask: Any = torch.compiler.disable(_make_block_mask)  # in a compiled program it breaks the graph, once


def _visible(q: Tensor, k: Tensor, left: int) -> Tensor:
    return (k <= q) & (q - k <= left)
