"""Hugging Face Trainer: a ResNet learns where the class token of a ViT looks."""

import tempfile

import torch
import transformers

import attention_transfer as at
from attention_transfer.integrations.transformers import AttentionTransferTrainer

CLASSES, SIZE = 4, 64


def make_networks():
    """Small untrained networks; use `from_pretrained` for real ones."""
    classes = {"num_labels": CLASSES}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": SIZE}
    vit = transformers.ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, **classes)
    widths = {"embedding_size": 16, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1]}
    resnet = transformers.ResNetConfig(**widths, layer_type="basic", **classes)
    return (
        transformers.ResNetForImageClassification(resnet),
        transformers.ViTForImageClassification(vit),
    )


def main():
    torch.manual_seed(0)
    student, teacher = make_networks()
    images = torch.rand(32, 3, SIZE, SIZE)
    data = [{"pixel_values": x, "labels": i % CLASSES} for i, x in enumerate(images)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = AttentionTransferTrainer(
            student,
            transformers.TrainingArguments(folder, max_steps=4, report_to=[], logging_steps=2),
            teacher=teacher,
            example=images,
            methods=[at.ActivationTransfer(3, convention="caffe", teacher_kind="attention")],
            train_dataset=data,
            eval_dataset=data[:8],
        )
        print("pairs:", trainer.model.transfer.pairs)
        trainer.train()
        print(trainer.evaluate())
        trainer.save_model(f"{folder}/student")
        transformers.ResNetForImageClassification.from_pretrained(f"{folder}/student")


if __name__ == "__main__":
    main()
