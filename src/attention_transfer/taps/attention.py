"""The attention of a transformer's block, from the q and k that it passes to the fused kernel.

The network is not changed: q and k are read from the calls of `F.scaled_dot_product_attention`, so
they include the norms, rotary embeddings, scales and biases of any network. Only the rows of
softmax(q·kᵀ/√d) that the map needs are computed again; gradients flow to q and k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from ..numerics import at_least_float32
from .layout import Hints, Size, find_layout

# Names of the parameter in timm, torchvision and transformers. The class token is the first token.
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


class AttentionCall(NamedTuple):
    """The arguments of one call of the kernel: q (N, heads, L, d), k (N, heads, K, d)."""

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None

    def rows(self, first_only: bool) -> Tensor:
        """The mean row of softmax(q·kᵀ·scale + mask), or only the first row: (N, heads, K)."""
        q, k, mask = self.q, self.k, self.mask
        if first_only:
            q = q[:, :, :1]
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., :1, :]
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        # Autocast would multiply in bfloat16.
        with torch.autocast(q.device.type, enabled=False):
            # With grouped queries several heads share a key.
            k = at_least_float32(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = scale * at_least_float32(q) @ k.transpose(2, 3)
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                scores = scores + mask
            return scores.softmax(-1).mean(2)


class AttentionWatch(TorchFunctionMode):
    """Keeps the last call of the kernel in each tapped layer that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[str, Callable[[], AttentionCall | None] | None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _READERS.get(func) if self.running else None
        if read is not None:
            for layer in self.running:
                # Not read yet, because only the last call in a layer counts.
                self.running[layer] = partial(read, *args, **kwargs)
        return func(*args, **kwargs)


def _kernel_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    return AttentionCall(query, key, attn_mask, is_causal, scale)


def _multi_head_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *args: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> AttentionCall | None:
    """The q and k of `nn.MultiheadAttention`, which computes them inside one function."""
    options = bias_k, key_padding_mask, attn_mask
    if weight is None or add_zero_attn or any(option is not None for option in options):
        return None
    projected = []
    for j, tokens in enumerate((query, key)):  # (L, N, E)
        rows = slice(j * embed_dim, (j + 1) * embed_dim)
        x = F.linear(tokens, weight[rows], None if bias is None else bias[rows])
        projected.append(x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3))
    return AttentionCall(*projected)


_READERS: dict[Any, Callable[..., AttentionCall | None]] = {
    F.scaled_dot_product_attention: _kernel_call,
    F.multi_head_attention_forward: _multi_head_call,
}


def has_class_token(model: nn.Module) -> bool:
    """Whether the network has a parameter with one of the usual names of class tokens."""
    names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    return any(name in CLASS_TOKENS for name in names)


def patch_attention(
    call: AttentionCall | None,
    layer: str,
    image: Size | None,
    batch: int | None,
    hints: Hints,
    class_token: bool,
) -> Tensor:
    """The attention of each head over the patches, (N, heads, h, w), in at least float32.

    It is the class token's row of softmax(q·kᵀ/√d), without the columns of prefix tokens; without a
    class token it is the mean of all rows.

    Raises:
        UserError: unless the layer computed attention over all patches of the image.
    """
    if call is None:
        raise UserError(
            f"layer {layer!r} has no attention that can be read: expected a transformer's block "
            "that calls F.scaled_dot_product_attention (timm: set_fused_attn(True); transformers: "
            "attn_implementation='sdpa')"
        )
    q, k = call.q, call.k
    if call.is_causal:
        raise UserError(f"layer {layer!r} has causal attention: expected one over all patches")
    layout = None
    # Hiera's tokens are ordered by windows.
    if q.ndim == 4 and q.shape[0] == batch and hints.reorder is None:
        layout = find_layout((k.shape[0], k.shape[2], k.shape[3]), image, hints)
    if layout is None or layout.grid == (1, 1):
        raise UserError(
            f"layer {layer!r} computes attention of q {tuple(q.shape)} and k {tuple(k.shape)}, "
            "which is not over the patches of the whole image (windows, channels): expected a "
            "block of a plain vision transformer"
        )
    rows = call.rows(first_only=class_token and layout.prefix > 0)
    patches = rows[:, :, layout.prefix :]
    # Not `unflatten`, which PyTorch 2.11 cannot compile here.
    return patches.reshape(*patches.shape[:2], *layout.grid)
