"""Weight gradients of a loss on input gradients, without double backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attention_transfer as at


def forward_over_reverse(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """{parameter: gradient of loss(J)}, by J without a graph and v = ∂loss/∂J.

    ∂loss/∂W = ∂/∂W ⟨J, v⟩, and ⟨J, v⟩ is the derivative of the summed cross-entropy along v, which
    forward mode gives in one pass. The model must be deterministic, as it runs twice.
    """
    j = at.input_gradient(model, x, y).requires_grad_()
    (v,) = torch.autograd.grad(loss(j), j)

    def total(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="sum")

    _, product = torch.func.jvp(total, (x,), (v,))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(product, parameters)
    return dict(zip(names, gradients, strict=True))
