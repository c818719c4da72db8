"""Lightning: the Trainer trains the student of a Transfer, on the digits of scikit-learn."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import attention_transfer as at
from attention_transfer.integrations.lightning import AttentionTransferModule


def make_loaders():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, scale_factor=2).expand(-1, 3, -1, -1)
    data = TensorDataset(images.contiguous(), torch.tensor(digits.target))
    train, val = (
        torch.utils.data.Subset(data, range(256)),
        torch.utils.data.Subset(data, range(256, 320)),
    )
    return DataLoader(train, 64, shuffle=True), DataLoader(val, 64)


def main():
    lightning.seed_everything(0)
    train, val = make_loaders()
    teacher = at.create_model("wrn-10-2", num_classes=10)  # use a trained network
    student = at.create_model("wrn-10-1", num_classes=10)
    methods = [at.ActivationTransfer(decay="linear"), at.KnowledgeDistillation()]
    example = next(iter(train))[0][:32]
    transfer = at.Transfer(student, teacher, methods, example=example)
    module = AttentionTransferModule(transfer, lambda p: torch.optim.SGD(p, 0.05, 0.9))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train, val)
    print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
