"""Made-up files of the authors' scripts, and their networks evaluated from the tensors by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


def convolution(inputs: int, outputs: int, kernel: int) -> Tensor:
    return torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5


def normalisation(name: str, channels: int) -> Params:
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels) / 4,
        f"{name}.running_mean": torch.randn(channels) / 4,
        f"{name}.running_var": torch.rand(channels) + 0.5,
    }


def wrn_params(depth: int, width: int, classes: int = 10) -> Params:
    """The tensors of the authors' CIFAR network."""
    widths = [16, 16 * width, 32 * width, 64 * width]
    params = {"conv0": convolution(3, 16, 3)}
    for g in range(3):
        for b in range((depth - 4) // 6):
            base, outputs = f"group{g}.block{b}", widths[g + 1]
            inputs = widths[g] if b == 0 else outputs
            params[f"{base}.conv0"] = convolution(inputs, outputs, 3)
            params[f"{base}.conv1"] = convolution(outputs, outputs, 3)
            params |= normalisation(f"{base}.bn0", inputs) | normalisation(f"{base}.bn1", outputs)
            if inputs != outputs:
                params[f"{base}.convdim"] = convolution(inputs, outputs, 1)
    params |= normalisation("bn", widths[3])
    return params | {"fc.weight": torch.randn(classes, widths[3]), "fc.bias": torch.randn(classes)}


def bn(x: Tensor, params: Params, name: str) -> Tensor:
    w, b, m, v = (params[f"{name}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(x, m, v, w, b, False, 0.1, 1e-5)


def wrn(x: Tensor, params: Params) -> tuple[Tensor, list[Tensor]]:
    """Logits and the groups' outputs of the authors' CIFAR network."""
    x, groups = F.conv2d(x, params["conv0"], padding=1), []
    for g in range(3):
        b = 0
        while (base := f"group{g}.block{b}") + ".conv0" in params:
            stride = 2 if g > 0 and b == 0 else 1
            o = F.relu(bn(x, params, f"{base}.bn0"))
            z = F.conv2d(o, params[f"{base}.conv0"], stride=stride, padding=1)
            z = F.conv2d(F.relu(bn(z, params, f"{base}.bn1")), params[f"{base}.conv1"], padding=1)
            if f"{base}.convdim" in params:
                x = F.conv2d(o, params[f"{base}.convdim"], stride=stride)
            x = z + x
            b += 1
        groups.append(x)
    o = F.relu(bn(x, params, "bn"))
    o = F.avg_pool2d(o, o.shape[-1]).flatten(1)
    return F.linear(o, params["fc.weight"], params["fc.bias"]), groups


def resnet_params(
    blocks: list[int], width: int = 4, classes: int = 12, folded: bool = False
) -> Params:
    """The tensors of the authors' ImageNet student, or of its teacher (`folded`)."""
    names = ("conv0.weight", "conv1.weight") if folded else ("conv0", "conv1")
    params = {names[0]: convolution(3, width, 7)}
    params |= {"conv0.bias": torch.randn(width) / 4} if folded else normalisation("bn0", width)
    inputs = width
    for g, count in enumerate(blocks):
        for b in range(count):
            base, outputs = f"group{g}.block{b}", width * 2**g
            params[f"{base}.{names[0]}"] = convolution(inputs, outputs, 3)
            params[f"{base}.{names[1]}"] = convolution(outputs, outputs, 3)
            for k in "01":
                if folded:
                    params[f"{base}.conv{k}.bias"] = torch.randn(outputs) / 4
                else:
                    params |= normalisation(f"{base}.bn{k}", outputs)
            if inputs != outputs:
                params[f"{base}.{'conv_dim.weight' if folded else 'convdim'}"] = convolution(
                    inputs, outputs, 1
                )
            inputs = outputs
    return params | {"fc.weight": torch.randn(classes, inputs), "fc.bias": torch.randn(classes)}


def resnet(x: Tensor, params: Params) -> tuple[Tensor, list[Tensor]]:
    """Logits and group outputs of the authors' ImageNet student, or of its folded teacher."""
    folded = "conv0.weight" in params

    def convolve(x: Tensor, base: str, k: int, stride: int, padding: int) -> Tensor:
        name = f"{base}conv{k}"
        if folded:
            return F.conv2d(x, params[f"{name}.weight"], params[f"{name}.bias"], stride, padding)
        return bn(F.conv2d(x, params[name], None, stride, padding), params, f"{base}bn{k}")

    x, groups = F.max_pool2d(F.relu(convolve(x, "", 0, 2, 3)), 3, 2, 1), []
    for g in range(4):
        blocks = {name.split(".")[1] for name in params if name.startswith(f"group{g}.")}
        for b in range(len(blocks)):
            base, stride = f"group{g}.block{b}.", 2 if g > 0 and b == 0 else 1
            y = convolve(F.relu(convolve(x, base, 0, stride, 1)), base, 1, 1, 1)
            dim = params.get(f"{base}convdim", params.get(f"{base}conv_dim.weight"))
            x = F.relu(y + (x if dim is None else F.conv2d(x, dim, stride=stride)))
        groups.append(x)
    o = F.avg_pool2d(x, x.shape[-1]).flatten(1)
    return F.linear(o, params["fc.weight"], params["fc.bias"]), groups


def write_run(folder: Path, params: Params, teacher: Params | None = None, **options: Any) -> Path:
    """A run folder with these tensors, of a distillation if there is a `teacher`."""
    folder.mkdir(parents=True, exist_ok=True)
    if teacher is not None:
        params = {f"student.{k}": v for k, v in params.items()} | {
            f"teacher.{k}": v for k, v in teacher.items()
        }
    torch.save(
        {"params": params, "optimizer": {"state": {}, "param_groups": []}, "epoch": 2},
        folder / "model.pt7",
    )
    lines = [json.dumps({"lr": 0.1, "epoch": epoch} | options) for epoch in (1, 2)]
    (folder / "log.txt").write_text("".join(f"json_stats: {line}\n" for line in lines))
    return folder
