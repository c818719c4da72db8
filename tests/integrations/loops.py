"""Trains a student in each integration's loop, in one process or by torchrun in several.

    torchrun --nproc-per-node 2 tests/integrations/loops.py lightning OUT

The batch over all processes is the same, whatever their number. No network has batch statistics.
Each process writes its student to OUT/RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from toys import batch, make

import attention_transfer as at

IMAGES, BATCH, EPOCHS, RATE = 8, 4, 2, 0.1
STEPS = EPOCHS * IMAGES // BATCH
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SHARE = BATCH // WORLD


def methods() -> list[Any]:
    return [at.ActivationTransfer(beta=10, decay="linear"), at.KnowledgeDistillation(0.5)]


def make_transfer() -> at.Transfer:
    return make(*methods())


def images(size: int = 8) -> TensorDataset:
    return TensorDataset(*batch(IMAGES, size))


def in_shares(images: TensorDataset) -> DataLoader:
    """The images of this process, in their order."""
    sampler: Any = DistributedSampler(images, WORLD, RANK, shuffle=False)
    return DataLoader(images, SHARE, sampler=sampler)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, RATE, momentum=0.9)


def train_lightning(folder: Path) -> nn.Module:
    import lightning

    from attention_transfer.integrations.lightning import AttentionTransferModule

    transfer = make_transfer()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=WORLD,
        strategy="auto" if WORLD == 1 else "ddp",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = AttentionTransferModule(transfer, optimizer=sgd)
    trainer.fit(module, in_shares(images()), in_shares(images()))
    return transfer.student


def train_accelerate(folder: Path) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    transfer: Any = make_transfer()
    optimizer: Any = sgd(transfer.trainable_parameters())
    transfer, optimizer, loader = accelerator.prepare(
        transfer, optimizer, DataLoader(images(), SHARE)
    )
    step = 0
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(transfer(x, y, step / STEPS).loss)
            optimizer.step()
            step += 1
    return accelerator.unwrap_model(transfer).student


def train_timm(folder: Path) -> nn.Module:
    import timm

    from attention_transfer.integrations.timm import AttentionTransferTask

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)

    data = images(32)
    pairs = [("blocks.1", "blocks.1")]
    task = AttentionTransferTask(
        network(0),
        network(1),
        data.tensors[0],
        methods=methods(),
        pairs=pairs,
        verbose=False,
    )
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
        task.prepare_distributed()
    optimizer = sgd(task.get_clip_parameters())
    step = 0
    for _ in range(EPOCHS):
        for x, y in in_shares(data):
            task.progress = step / STEPS
            optimizer.zero_grad()
            task(x, y)["loss"].backward()
            optimizer.step()
            step += 1
    return task.transfer.student


def train_transformers(folder: Path) -> nn.Module:
    import transformers

    from attention_transfer.integrations.transformers import AttentionTransferTrainer

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8, num_labels=5,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)

    x, y = batch(IMAGES, 32)
    data = [
        {"pixel_values": image, "labels": int(label)} for image, label in zip(x, y, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=SHARE,
        learning_rate=RATE,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = AttentionTransferTrainer(
        network(0), arguments, teacher=network(1), example=x, methods=methods(), train_dataset=data
    )
    trainer.train()
    return trainer.student


LOOPS = {
    "lightning": train_lightning,
    "accelerate": train_accelerate,
    "timm": train_timm,
    "transformers": train_transformers,
}


def train(loop: str, folder: Path) -> dict[str, Tensor]:
    """Writes and returns the weights of this process's student."""
    weights = LOOPS[loop](folder).state_dict()
    torch.save(weights, folder / f"{RANK}.pt")
    return weights


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
