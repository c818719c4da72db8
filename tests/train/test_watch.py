"""What a run says of the balance between labels and transfer, and when."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from small_runs import carry_out, distilled, rows

import attention_transfer as at
from attention_transfer.methods.base import Method
from attention_transfer.train.watch import EPOCHS, SLOW_START, Watch, transfer_ratio

GUESS = math.log(10)


AUTO, FIXED, KD = at.ActivationTransfer(), at.ActivationTransfer(1000.0), at.KnowledgeDistillation()


def row(
    ce: float, transfer: float, loss: float = GUESS, step: int = 1000, part: str = "at"
) -> dict[str, Any]:
    return {"gradients": {"ce": ce, part: transfer}, "train_loss": loss, "step": step}


def said(
    rows: list[dict[str, Any]], progress: float = 0.5, methods: Sequence[Method] = (FIXED,)
) -> list[str]:
    lines: list[str] = []
    watch = Watch(lines.append, 10, methods)
    for count in range(1, len(rows) + 1):
        watch.check_balance(rows[:count], progress)
    return lines


def test_transfer_that_drowns_the_labels_is_named_once() -> None:
    (line,) = said([row(1.0, 20.0)] * 8)
    assert "20 times" in line and "--beta auto" in line and "2.30" in line


def test_transfer_without_weight_is_named_once() -> None:
    (line,) = said([row(1.0, 0.001)] * 8)
    assert "next to nothing" in line and "0.1%" in line


def test_the_advice_under_beta_auto_is_not_beta_auto() -> None:
    (strong,) = said([row(1.0, 20.0)] * 8, methods=[AUTO])
    assert "train longer (--epochs)" in strong and "leave it to" not in strong
    (weak,) = said([row(1.0, 0.001)] * 8, methods=[AUTO])
    assert "give --beta a larger number" in weak and "leave it to" not in weak


def test_a_student_that_has_not_begun_to_learn_under_beta_auto() -> None:
    first_steps = [row(1.0, 20.0, step=SLOW_START - 1)] * 8
    assert said(first_steps, methods=[AUTO]) == []
    assert len(said(first_steps)) == 1  # of a β that a person has given


def test_the_advice_names_the_option_of_the_term() -> None:
    (strong,) = said([row(1.0, 20.0, part="kd")] * 8, methods=[KD])
    assert "train longer (--epochs)" in strong and "lower --alpha" in strong
    (weak,) = said([row(1.0, 0.001, part="kd")] * 8, methods=[KD])
    assert "raise --alpha" in weak
    both = {"gradients": {"ce": 1.0, "at": 3.0, "kd": 20.0}, "train_loss": GUESS, "step": 1000}
    (line,) = said([both] * 8, methods=[AUTO, KD])
    assert "--alpha" in line and "--beta" not in line
    (line,) = said([row(1.0, 20.0, part="gradient")] * 8, methods=[at.GradientTransfer()])
    assert "lower --beta" in line and "auto" not in line  # it takes a number only


def test_distillation_may_start_slowly() -> None:
    first_steps = [row(1.0, 20.0, step=SLOW_START - 1, part="kd")] * 8
    assert said(first_steps, methods=[KD]) == []


@pytest.mark.parametrize(
    "rows",
    [
        [row(1.0, 20.0)] * (EPOCHS - 1),  # too few epochs
        [row(1.0, 20.0, loss=1.0)] * 8,  # the labels are learned all the same
        [row(1.0, 20.0), row(1.0, 2.0)] * 4,  # not in every epoch
        [row(1.0, 1.0)] * 8,
        [{"gradients": {"ce": 1.0}, "train_loss": GUESS}] * 8,  # the student alone
        [{"train_loss": GUESS}] * 8,  # a run of an older version
    ],
)
def test_nothing_is_said_of_a_sound_balance(rows: list[dict[str, Any]]) -> None:
    assert said(rows) == []


def test_the_start_of_training_is_no_evidence() -> None:
    assert said([row(1.0, 20.0)] * 8, progress=0.1) == []


def test_terms_of_transfer_add_up() -> None:
    assert transfer_ratio({"gradients": {"ce": 2.0, "at": 1.0, "kd": 3.0}}) == 2.0
    assert transfer_ratio({"gradients": {"ce": 0.0, "at": 1.0}}) is None


def test_a_run_whose_transfer_drowns_the_labels_says_so(teacher_run, tmp_path) -> None:
    recipe = distilled(teacher_run, method="at", beta=1e6, epochs=4, lr=1e-4)
    said = carry_out(recipe, tmp_path / "run")
    assert said.count("transfer outweighs the labels") == 1


def test_a_short_run_under_beta_auto_says_nothing(teacher_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("attention_transfer.train.watch.TOO_STRONG", 1.0)
    recipe = distilled(teacher_run, method="at", beta="auto", epochs=4, lr=1e-9)
    said = carry_out(recipe, tmp_path / "run")
    ratios = [transfer_ratio(row) for row in rows(tmp_path / "run")]
    assert min(ratios) > 1  # otherwise nothing would be said anyway
    assert "outweighs" not in said


def test_a_run_whose_transfer_does_nothing_says_so(teacher_run, tmp_path) -> None:
    recipe = distilled(teacher_run, method="at", beta=1e-4, epochs=3)
    said = carry_out(recipe, tmp_path / "run")
    assert said.count("transfer does next to nothing") == 1
