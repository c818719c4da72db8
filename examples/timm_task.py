"""timm: attention transfer as a training task, with an EMA of the student."""

import timm
import torch

from attention_transfer.integrations.timm import AttentionTransferTask

CLASSES, STEPS = 4, 6


def make_batch(n=8, size=64):
    """Random images and labels, instead of a timm loader."""
    return torch.randn(n, 3, size, size), torch.randint(CLASSES, (n,))


def main():
    torch.manual_seed(0)
    student = timm.create_model("resnet10t", num_classes=CLASSES)
    teacher = timm.create_model("resnet18", num_classes=CLASSES)  # use a trained network
    task = AttentionTransferTask(student, teacher, example=make_batch()[0])
    print("pairs:", task.transfer.pairs)
    # For speed: task.compile(). Under torchrun: task.prepare_distributed(device_ids=[local_rank]).
    task.setup_ema(decay=0.9)
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)
    task.train()
    for step in range(STEPS):
        task.progress = step / STEPS
        result = task(*make_batch())
        optimizer.zero_grad()
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        task.update_ema(step)
        losses = {name: round(result[name].item(), 3) for name in ("loss", "task_loss", "at_loss")}
        print(step, losses)
    evaluated = task.get_eval_model(ema=True).eval()
    print("EMA student:", tuple(evaluated(make_batch()[0]).shape))


if __name__ == "__main__":
    main()
