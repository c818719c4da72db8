"""Examples of each command, printed in its help."""

from __future__ import annotations

EXAMPLES = {
    "demo": ("demo", "demo --out /tmp/demo --seeds 1"),
    "train": (
        "train --recipe cifar10-short --model wrn-16-2 --out runs/teacher",
        "train --recipe finetune --model timm/resnet18:pretrained --data folder:cats --out cats",
    ),
    "distill": (
        "distill --teacher runs/teacher --student wrn-16-1 --data digits --out runs/student",
        "distill --recipe cifar10-short --teacher runs/teacher --seeds 5 --out runs/students",
        "distill --config runs/student/config.yaml --lr 0.1 --out runs/slower",
    ),
    "teach": ("teach --teacher runs/teacher --data digits --views 4 --out stores/digits",),
    "evaluate": (
        "evaluate runs/student",
        "evaluate timm/resnet18:pretrained --data folder:imagenet --json numbers.json",
    ),
    "predict": ("predict runs/student cat.jpg", "predict runs/student photos/ --top 3"),
    "compare": ("compare runs/*", "compare runs/* --speed --out report.html"),
    "maps": (
        "maps runs/teacher runs/student --images digits --out maps.png",
        "maps timm/resnet18:pretrained --images photos/ --kind gradient --out maps.svg",
    ),
    "stages": ("stages wrn-16-2", "stages wrn-16-1 timm/resnet18 --image-size 64"),
    "export": (
        "export runs/student --format onnx --with-attention --out student.onnx",
        "export runs/student --format onnx --int8 --out student-int8.onnx",
    ),
    "push": (
        "push runs/student ann/small --dry-run --out small",
        "push runs/student ann/small --private",
    ),
    "view": ("view runs/teacher runs/student",),
    "zoo": ("zoo",),
    "reproduce": (
        "reproduce table1 --seeds 1",
        "reproduce table1 --rows wrn-16-2:wrn-16-1 --epochs 1 --limit-train 2000",
    ),
    "study": ("study beta", "study cost --pairs wrn-16-2:wrn-16-1"),
    "completion": (
        "completion bash > ~/.local/share/bash-completion/completions/attention-transfer",
        "completion zsh > ~/.zfunc/_attention-transfer",
    ),
    "bench": ("bench step", "bench loss --json loss.json"),
}
