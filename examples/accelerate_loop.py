"""accelerate: a plain loop that prepares the Transfer, not the student inside it."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import attention_transfer as at

CLASSES, EPOCHS = 4, 2


def main():
    torch.manual_seed(0)
    images, labels = torch.rand(64, 3, 16, 16), torch.arange(64) % CLASSES
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    student = at.create_model("wrn-10-1", num_classes=CLASSES)
    teacher = at.create_model("wrn-10-2", num_classes=CLASSES)  # use a trained network
    transfer = at.Transfer(student, teacher, [at.ActivationTransfer()], example=images[:32])
    optimizer = torch.optim.SGD(transfer.trainable_parameters(), lr=0.05, momentum=0.9)

    accelerator = Accelerator()
    transfer, optimizer, loader = accelerator.prepare(transfer, optimizer, loader)
    for epoch in range(EPOCHS):
        for x, y in loader:
            out = transfer(x, y, epoch / EPOCHS)
            optimizer.zero_grad()
            accelerator.backward(out.loss)
            optimizer.step()
        parts = {name: round(part.item(), 3) for name, part in out.parts.items()}
        accelerator.print(f"epoch {epoch + 1}: {parts}")
    trained = accelerator.unwrap_model(transfer).student
    print("student:", sum(p.numel() for p in trained.parameters()), "parameters")


if __name__ == "__main__":
    main()
