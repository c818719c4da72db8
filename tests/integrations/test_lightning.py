"""`AttentionTransferModule` in a Lightning Trainer."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import Net, batch, close, make

import attention_transfer as at
from attention_transfer.integrations.lightning import AttentionTransferModule


def fit(transfer, folder, **options):
    loader = DataLoader(TensorDataset(*batch(8)), 4)
    module = AttentionTransferModule(transfer, **options)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader, loader)
    return trainer, module


def test_trains_and_logs(tmp_path):
    transfer = make(at.ActivationTransfer(beta=1, decay="linear"), at.KnowledgeDistillation())
    teacher = [p.clone() for p in transfer.teacher.parameters()]
    before = transfer.student.fc.weight.detach().clone()
    trainer, module = fit(transfer, tmp_path, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert not torch.equal(before, transfer.student.fc.weight)
    for a, b in zip(teacher, transfer.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    names = {"train_loss", "train_ce", "train_at", "train_kd", "val_loss", "val_accuracy"}
    assert trainer.callback_metrics.keys() == names
    x, _ = batch(8)
    with torch.no_grad():
        close(module.eval()(x), transfer.student(x), 1e-6)


def test_the_share_of_the_training_grows(tmp_path):
    seen = []

    class Watched(at.Transfer):
        def forward(self, x, y, progress=None, teacher=None):
            seen.append(float(progress))
            return super().forward(x, y, progress, teacher)

    method = at.ActivationTransfer(beta=1, decay="linear")
    fit(Watched(Net(), Net(8, seed=1), [method], example=batch()[0]), tmp_path)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_checkpoints_do_not_hold_the_teacher(tmp_path):
    trainer, module = fit(make(at.ActivationTransfer(beta=1)), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert state.keys() == {f"transfer.student.{n}" for n in module.transfer.student.state_dict()}
