"""`AttentionTransferTask` does what timm's own tasks do, with the loss of `Transfer`."""

import pytest
import timm
import torch
from torch import nn
from toys import close

import attention_transfer as at

pytest.importorskip("timm.task")
integration = pytest.importorskip("attention_transfer.integrations.timm")

CLASSES = 3
STUDENT = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
TEACHER = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def network(name, config):
    model = timm.create_model(name, num_classes=CLASSES)
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
    return model


def batch():
    torch.manual_seed(1)
    return torch.rand(4, 3, 64, 64), torch.arange(4) % CLASSES


def make_task(**options):
    torch.manual_seed(0)
    student, teacher = network("resnet10t", STUDENT), network("resnet18", TEACHER)
    options = {"methods": [at.ActivationTransfer(beta=10)], "verbose": False} | options
    return integration.AttentionTransferTask(
        student, teacher, normalised(STUDENT), **options
    ), teacher


def normalised(config):
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (batch()[0] - mean) / std


def test_the_loss_is_that_of_transfer():
    task, teacher = make_task(distill_loss_weight=2.0, task_loss_weight=0.5)
    task.eval()
    result = task(normalised(STUDENT), batch()[1])
    layers = [[pair[j] for pair in task.transfer.pairs] for j in (0, 1)]
    with torch.no_grad():
        logits, ours = at.tap(task.transfer.student, layers[0])(normalised(STUDENT))
        _, theirs = at.tap(teacher.eval(), layers[1])(normalised(TEACHER))
    expected = 10 * at.at_loss(list(ours.values()), list(theirs.values()))
    close(result["at_loss"], expected, 1e-4)
    task_loss = nn.functional.cross_entropy(logits, batch()[1])
    close(result["task_loss"], task_loss, 1e-5)
    close(result["loss"], 0.5 * task_loss + 2 * expected, 1e-4)


def test_distillation_leaves_a_share_to_the_labels():
    methods = [at.KnowledgeDistillation(alpha=0.9)]
    task, _ = make_task(methods=methods, criterion_kwargs={"smoothing": 0.2})
    result = task(normalised(STUDENT), batch()[1])
    expected = nn.CrossEntropyLoss(label_smoothing=0.2)(result["output"], batch()[1])
    close(result["task_loss"], expected, 1e-5)
    close(result["loss"], 0.1 * expected + result["kd_loss"], 1e-5)


def test_only_the_student_trains():
    task, _ = make_task()
    assert not task.train().transfer.teacher.training
    task(normalised(STUDENT), batch()[1])["loss"].backward()
    assert all(p.grad is not None for p in task.get_clip_parameters())
    assert len(task.get_clip_parameters(exclude_head=True)) == len(task.get_clip_parameters()) - 2
    assert all(p.grad is None for p in task.transfer.teacher.parameters())
    assert not any("teacher" in name for name in task.trainable_module.state_dict())


def test_the_average_is_of_the_student():
    task, _ = make_task()
    task.setup_ema(decay=0.5)
    before = task.transfer.student.fc.weight.detach().clone()
    with torch.no_grad():
        task.transfer.student.fc.weight.zero_()
    task.update_ema()
    average = task.get_eval_model(ema=True).module
    close(average.fc.weight, before / 2, 1e-6)


def test_checkpoints_hold_the_student_and_the_methods():
    task, _ = make_task(methods=[at.ActivationTransfer(), at.FullActivationTransfer()])
    other, _ = make_task(methods=[at.ActivationTransfer(), at.FullActivationTransfer()])
    with torch.no_grad():
        for parameter in task.trainable_module.parameters():
            parameter.add_(1)
    state = task.get_checkpoint_state()
    assert state["state_dict"].keys() == task.transfer.student.state_dict().keys()
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    ours, theirs = task.trainable_module.parameters(), other.trainable_module.parameters()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_decay_takes_its_progress():
    task, _ = make_task(methods=[at.ActivationTransfer(beta=10, decay="linear")])
    with pytest.raises(ValueError, match="needs progress"):
        task(normalised(STUDENT), batch()[1])
    task.progress = 1.0
    assert task(normalised(STUDENT), batch()[1])["at_loss"] == 0


def test_compiled_and_distributed(tmp_path):
    task, _ = make_task()
    task.eval()
    expected = task(normalised(STUDENT), batch()[1])["loss"].item()
    compiled = task.compile(backend="eager")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        assert task.prepare_distributed() is task
        with task.no_sync():
            loss = task(normalised(STUDENT), batch()[1])["loss"]
            loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert task.get_eval_model() is compiled
        assert (
            task.get_checkpoint_state()["state_dict"].keys()
            == task.transfer.student.state_dict().keys()
        )
    finally:
        torch.distributed.destroy_process_group()
