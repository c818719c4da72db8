"""torchvision detection: a Faster R-CNN learns from the levels of a larger one's backbone."""

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import attention_transfer as at

LEVELS = ["backbone.body.layer2", "backbone.body.layer3", "backbone.body.layer4"]
WEIGHT = 3.0  # of ½‖D‖², summed over the levels
CLASSES, STEPS, SIZE = 3, 2, 96


def make_detector(name):
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None)
    return FasterRCNN(backbone, CLASSES, min_size=SIZE, max_size=SIZE)


def make_batch(n=2):
    """Random images with a box each, instead of a data loader."""
    boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    return [torch.rand(3, SIZE, SIZE) for _ in range(n)], [dict(target) for _ in range(n)]


def main():
    torch.manual_seed(0)
    student = make_detector("resnet18")
    teacher = make_detector("resnet34").eval()  # use a trained network
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    student.train()
    with at.tap(student, LEVELS) as tapped, at.tap(teacher, LEVELS) as tapped_teacher:
        for step in range(STEPS):
            images, targets = make_batch()
            losses, features = tapped(images, targets)
            with torch.no_grad():
                _, teacher_features = tapped_teacher(images)
            losses["at"] = WEIGHT * at.at_loss(features, teacher_features, convention="caffe")
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            print(step, {name: round(loss.item(), 3) for name, loss in losses.items()})


if __name__ == "__main__":
    main()
