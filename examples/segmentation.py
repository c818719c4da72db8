"""torchvision segmentation: a small network learns from the stages of a larger one's backbone."""

import torch
import torch.nn.functional as F
from torchvision.models import segmentation

import attention_transfer as at

CLASSES, STEPS, SIZE = 3, 2, 64
WEIGHT = 3.0  # of ½‖D‖², summed over the pairs


def make_batch(n=2):
    """Random images and masks, instead of a data loader."""
    return torch.rand(n, 3, SIZE, SIZE), torch.randint(CLASSES, (n, SIZE, SIZE))


def main():
    torch.manual_seed(0)
    none = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    student = segmentation.lraspp_mobilenet_v3_large(**none)
    teacher = segmentation.fcn_resnet50(**none).eval()  # use a trained network
    pairs = at.pair_stages(student.backbone, teacher.backbone, make_batch()[0])
    student_layers = [f"backbone.{student_layer}" for student_layer, _ in pairs]
    teacher_layers = [f"backbone.{teacher_layer}" for _, teacher_layer in pairs]
    print("pairs:", pairs)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student.train()
    with (
        at.tap(student, student_layers) as tapped,
        at.tap(teacher, teacher_layers) as tapped_teacher,
    ):
        for step in range(STEPS):
            x, masks = make_batch()
            outputs, features = tapped(x)
            with torch.no_grad():
                _, teacher_features = tapped_teacher(x)
            ours = [features[layer] for layer in student_layers]
            theirs = [teacher_features[layer] for layer in teacher_layers]
            transfer = WEIGHT * at.at_loss(ours, theirs, convention="caffe")
            loss = F.cross_entropy(outputs["out"], masks) + transfer
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(step, {"loss": round(loss.item(), 3), "at": round(transfer.item(), 3)})


if __name__ == "__main__":
    main()
