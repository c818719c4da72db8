"""Draws the picture at the head of the README from three runs on the same photographs.

    python bench/head_picture.py TEACHER ALONE STUDENT docs/attention.jpg

The images are the first of the validation set, one per class, that the student alone gets wrong and
the student with a teacher gets right.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import attention_transfer as at
from attention_transfer.apply.evaluate import predict_logits, run_and_data
from attention_transfer.apply.inference import as_input
from attention_transfer.data.open import open_data

LAYERS = ("layer1", "layer2", "layer3")  # maps of 16×16, 8×8 and 4×4 positions, at 64 px
BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name in ("teacher", "alone", "student", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--limit", type=int, default=4, help="number of images")
    given = parser.parse_args()
    names = {"teacher": given.teacher, "student alone": given.alone}
    names["student, attention transfer + distillation"] = given.student
    models = {name: at.load_student(run) for name, run in names.items()}
    _, options = run_and_data(str(given.student), None, None, None, trust_code=False)
    data = open_data(**options)
    alone, student = (
        predict_logits(models[name], data.val, BATCH, "cpu").argmax(1) for name in list(names)[1:]
    )
    changed = (alone != data.val.labels) & (student == data.val.labels)
    first: dict[int, int] = {}
    for index in changed.nonzero().flatten().tolist():
        first.setdefault(int(data.val.labels[index]), index)
    chosen = torch.tensor([*first.values()][: given.limit])
    figure = at.plot.maps(
        models,
        as_input(data.val.batch(chosen)),
        LAYERS,
        classes=[name.split(",")[0] for name in data.classes],
        tile=96,
    )
    figure.savefig(given.out, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
