"""An interrupted run ends as an uninterrupted one, bit for bit; a finished run is not redone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from small_runs import (
    FLAGS,
    STEPS_PER_EPOCH,
    carry_out,
    contents,
    distilled,
    request_stop,
    rows,
    small,
    stop_after,
    write_factory,
)

from attention_transfer.errors import RunError, UserError
from attention_transfer.runtime.resolve import can_compile
from attention_transfer.train import trainer
from attention_transfer.train.signals import Interrupted

pytestmark = pytest.mark.usefixtures("quick_runs")
TOTAL = 2 * STEPS_PER_EPOCH


class Killed(BaseException):
    """As if the process were gone: nothing is saved after it."""


def interrupt(recipe, out, step):
    """Ctrl-C after `step` steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, request_stop)
        with pytest.raises(Interrupted):
            carry_out(recipe, out)


def kill(recipe, out, step):
    def die(loop):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, die)
        with pytest.raises(Killed):
            carry_out(recipe, out)


def saved_step(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


def assert_same_end(run, alone):
    assert (run / "student.safetensors").read_bytes() == (
        alone / "student.safetensors"
    ).read_bytes()
    assert rows(run) == rows(alone)


@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_interrupted_and_continued(student_run, teacher_run, tmp_path, step):
    recipe = distilled(teacher_run)
    interrupt(recipe, tmp_path / "run", step)
    assert saved_step(tmp_path / "run") == step
    assert len(rows(tmp_path / "run")) == step // STEPS_PER_EPOCH
    assert not (tmp_path / "run" / "summary.json").exists()
    said = carry_out(recipe, tmp_path / "run")
    assert f"continuing {tmp_path / 'run'} at step {step} of {TOTAL}" in said
    assert_same_end(tmp_path / "run", student_run)


def test_interrupted_again_and_again(teacher_run, tmp_path):
    for step in (1, 3, STEPS_PER_EPOCH, TOTAL - 1):
        interrupt(small(), tmp_path / "run", step)
        assert saved_step(tmp_path / "run") == step
    carry_out(small(), tmp_path / "run")
    assert_same_end(tmp_path / "run", teacher_run)


@pytest.mark.parametrize(
    "options", [{"schedule": "step", "milestones": [2]}, {"schedule": "cosine", "max_steps": 6}]
)
def test_every_schedule_continues(tmp_path, options):
    recipe = small(lr=0.05, **options)
    carry_out(recipe, tmp_path / "alone")
    interrupt(recipe, tmp_path / "run", STEPS_PER_EPOCH + 1)
    carry_out(recipe, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "alone")


def test_killed_in_the_second_epoch(teacher_run, tmp_path):
    kill(small(), tmp_path / "run", STEPS_PER_EPOCH + 2)
    assert saved_step(tmp_path / "run") == STEPS_PER_EPOCH
    assert "continuing" in carry_out(small(), tmp_path / "run")
    assert_same_end(tmp_path / "run", teacher_run)


def test_killed_before_the_first_save_starts_anew(teacher_run, tmp_path):
    kill(small(), tmp_path / "run", 2)
    assert "continuing" not in carry_out(small(), tmp_path / "run")
    assert_same_end(tmp_path / "run", teacher_run)


@pytest.mark.parametrize("between", ["save_checkpoint", "RunFolder.write_metrics"])
def test_killed_while_saving(teacher_run, tmp_path, between):
    """Checkpoint and metrics are two files; whichever is written first, each epoch has one row."""
    from attention_transfer.run_folder import RunFolder

    place, name = (trainer, between) if "." not in between else (RunFolder, between.split(".")[1])
    original, calls = getattr(place, name), []

    def once(*args):
        if calls:
            raise Killed
        calls.append(original(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, once)
        with pytest.raises(Killed):
            carry_out(small(epochs=3), tmp_path / "run")
    assert saved_step(tmp_path / "run") == STEPS_PER_EPOCH
    carry_out(small(epochs=3), tmp_path / "run")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_killed_after_the_last_epoch(teacher_run, tmp_path, monkeypatch):
    def die(*args):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attention_transfer.train.run.finish", die)
        with pytest.raises(Killed):
            carry_out(small(), tmp_path / "run")
    carry_out(small(), tmp_path / "run")
    assert_same_end(tmp_path / "run", teacher_run)


def test_a_last_line_cut_short(teacher_run, tmp_path):
    interrupt(small(), tmp_path / "run", STEPS_PER_EPOCH + 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "step')
    carry_out(small(), tmp_path / "run")
    assert_same_end(tmp_path / "run", teacher_run)


def test_a_damaged_checkpoint(tmp_path):
    interrupt(small(), tmp_path / "run", 1)
    file = tmp_path / "run" / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read .*: remove the run folder"):
        carry_out(small(), tmp_path / "run")


def flip_a_bit(file):
    """In the middle, where the weights are."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:100])


def replace_by_a_pickle(file):
    torch.save({"step": 4, "code": print}, file)


def fill_with_zeros(file):
    """As a power cut may leave it."""
    file.write_bytes(bytes(len(file.read_bytes())))


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut_short, replace_by_a_pickle, fill_with_zeros, os.unlink]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(teacher_run, tmp_path, damage):
    """Twice: the damaged file does not become the one before."""
    run = tmp_path / "run"
    interrupt(small(), run, STEPS_PER_EPOCH + 1)
    for _ in range(2):
        damage(run / "checkpoint.pt")
        interrupt(small(), run, STEPS_PER_EPOCH + 2)
        assert torch.load(run / "checkpoint-previous.pt", weights_only=True)["step"] == 4
    damage(run / "checkpoint.pt")
    said = carry_out(small(), run)
    assert f"continuing {run} at step {STEPS_PER_EPOCH} of {TOTAL}" in said
    assert said.count("continuing from the checkpoint before it") == (damage is not os.unlink)
    assert "weights_only" not in said
    assert_same_end(run, teacher_run)
    assert not (run / "checkpoint-previous.pt").exists()


def test_two_damaged_checkpoints(tmp_path):
    run = tmp_path / "run"
    interrupt(small(), run, STEPS_PER_EPOCH + 1)
    flip_a_bit(run / "checkpoint.pt")
    replace_by_a_pickle(run / "checkpoint-previous.pt")
    with pytest.raises(RunError) as error:
        carry_out(small(), run)
    assert "checkpoint.pt cannot be read (the checksum of its part" in str(error.value)
    assert "checkpoint-previous.pt cannot be read (it is no checkpoint of a run)" in str(
        error.value
    )
    assert "weights_only" not in str(error.value)


def test_a_checkpoint_of_another_network(tmp_path):
    interrupt(small(), tmp_path / "run", 1)
    interrupt(small(model="wrn-10-2"), tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "run")
    with pytest.raises(RunError, match=r"checkpoint\.pt does not fit this run \(.*\): restore the"):
        carry_out(small(), tmp_path / "run")


def test_a_checkpoint_of_another_seed(tmp_path):
    interrupt(small(), tmp_path / "run", 1)
    interrupt(small(seed=5), tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "run")
    with pytest.raises(RunError, match=r"checkpoint\.pt does not fit this run \(it is of seed 5\)"):
        carry_out(small(), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 10**9}, "its step is"),
        ({"rng": None}, "NoneType"),
        ({"step": "x"}, "str"),
        ({"seconds": None}, "seconds is None"),
        ({"rows": [{"epoch": 1}]}, r"rows\.0\.step"),
        ({"rows": "none"}, "rows is 'none'"),
        ({"unreadable": [-1]}, r"unreadable\.0 is -1"),
    ],
)
def test_a_checkpoint_with_other_values(tmp_path, change, words):
    interrupt(small(), tmp_path / "run", 1)
    file = tmp_path / "run" / "checkpoint.pt"
    torch.save(torch.load(file, weights_only=True) | change, file)
    with pytest.raises(RunError, match=rf"checkpoint\.pt does not fit this run \(.*{words}"):
        carry_out(small(), tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("scheduler last_epoch", None, "its scheduler.last_epoch is 'None'"),
        ("scheduler last_epoch", 10**9, "its scheduler is at step 1000000000"),
        ("scheduler _last_lr", [], r"its scheduler._last_lr is '\[\]'"),
        ("optimizer param_groups 0 nesterov", None, "group 0.nesterov is 'None'"),
        ("optimizer param_groups 0 lr", float("nan"), "group 0.lr is 'nan'"),
        ("optimizer param_groups 0 lr", 10**400, "group 0.lr is '1000"),
        ("optimizer state 3 momentum_buffer", None, "the momentum_buffer of a parameter does not"),
        ("optimizer state 3 momentum_buffer", torch.zeros(7), "the momentum_buffer of a parameter"),
        ("optimizer param_groups 0", torch.ones(2, 2), "too many indices"),
        ("optimizer state 3", {}, "parameters lack entries"),
        ("meter images", "many", "its number of images is 'many'"),
        ("meter sums", torch.zeros(1), "its sums are of other terms"),
    ],
)
def test_a_checkpoint_with_impossible_values(tmp_path, place, value, words):
    interrupt(small(), tmp_path / "run", 1)
    file = tmp_path / "run" / "checkpoint.pt"
    state = entry = torch.load(file, weights_only=True)
    *keys, last = (int(key) if key.isdigit() else key for key in place.split())
    for key in keys:
        entry = entry[key]
    entry[last] = value
    torch.save(state, file)
    with pytest.raises(RunError, match=rf"checkpoint\.pt does not fit this run \(.*{words}"):
        carry_out(small(), tmp_path / "run")


@pytest.mark.parametrize("damage", [os.unlink, cut_short, fill_with_zeros])
def test_lost_metrics_come_from_the_checkpoint(teacher_run, tmp_path, damage):
    run = tmp_path / "run"
    interrupt(small(), run, STEPS_PER_EPOCH + 1)
    damage(run / "metrics.jsonl")
    said = carry_out(small(), run)
    assert f"{run / 'metrics.jsonl'} is written anew" in said
    assert_same_end(run, teacher_run)


@pytest.mark.skipif(not can_compile("cpu"), reason="Inductor needs a C++ compiler")
def test_compiled_and_continued(tmp_path):
    teacher = tmp_path / "teacher"
    model = write_factory(tmp_path, "make_normalised")
    carry_out(small(model=model, epochs=1), teacher)
    recipe = distilled(teacher, model=model, compile="on", trust_code=True)
    assert "compiled" in carry_out(recipe, tmp_path / "alone")
    interrupt(recipe, tmp_path / "run", STEPS_PER_EPOCH + 2)
    shutil.copytree(tmp_path / "run", tmp_path / "eager")
    assert "continuing" in carry_out(recipe, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "alone")
    # Compiled or not is how, not what: the state fits, and the numbers are nearly the same.
    carry_out(distilled(teacher, model=model, compile="off", trust_code=True), tmp_path / "eager")
    compiled, eager = rows(tmp_path / "run")[-1], rows(tmp_path / "eager")[-1]
    assert eager["train_loss"] == pytest.approx(compiled["train_loss"], abs=0.02)
    assert eager["parts"] == pytest.approx(compiled["parts"], abs=0.02)


def test_a_finished_run_is_not_redone(teacher_run):
    before = {f.name: f.stat().st_mtime_ns for f in teacher_run.iterdir()}
    assert "is finished" in carry_out(small(), teacher_run)
    assert {f.name: f.stat().st_mtime_ns for f in teacher_run.iterdir()} == before


def test_a_finished_run_without_its_report_gets_it(tmp_path):
    carry_out(small(epochs=1, max_steps=1), tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    carry_out(small(epochs=1, max_steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_different_run_is_refused(teacher_run):
    before = contents(teacher_run)
    with pytest.raises(
        UserError,
        match=r"holds a different run \(seed is 0 in that run, 4 in this command; lr is 0\.2 in ",
    ):
        carry_out(small(lr=0.3, seed=4), teacher_run)
    assert contents(teacher_run) == before


def test_how_it_is_carried_out_may_differ(teacher_run):
    assert "is finished" in carry_out(small(device="auto", compile="auto"), teacher_run)


def test_another_precision_is_another_run(teacher_run):
    held = json.loads((teacher_run / "environment.json").read_text())["auto"]["precision"]
    other = "fp32" if held == "bf16" else "bf16"
    assert "is finished" in carry_out(small(precision=held), teacher_run)
    with pytest.raises(UserError, match=f"holds a run in {held}"):
        carry_out(small(precision=other), teacher_run)


def test_another_teacher_in_the_same_place_is_refused(tmp_path):
    carry_out(small(max_steps=1), tmp_path / "teacher")
    carry_out(distilled(tmp_path / "teacher", max_steps=1), tmp_path / "run")
    for file in (tmp_path / "teacher").iterdir():
        file.unlink()
    carry_out(small(max_steps=1, seed=1), tmp_path / "teacher")
    with pytest.raises(UserError, match="other weights of its teacher"):
        carry_out(distilled(tmp_path / "teacher", max_steps=1), tmp_path / "run")


@pytest.mark.parametrize("name", ["notes.txt", "train"])
def test_a_folder_with_other_things_is_refused(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(UserError, match="exists and holds no run"):
        carry_out(small(), tmp_path / "run")
    assert contents(tmp_path / "run") == {name: b"mine"}


@pytest.mark.parametrize("inside", [[], [".checkpoint.pt.7.partial"]])
def test_an_empty_folder_is_taken(tmp_path, inside):
    (tmp_path / "run").mkdir()
    for name in inside:
        (tmp_path / "run" / name).write_text("")
    carry_out(small(max_steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_what_auto_decided_is_kept(tmp_path):
    recipe = small(precision="auto", compile="auto", model=write_factory(tmp_path))
    interrupt(recipe, tmp_path / "run", 1)
    file = tmp_path / "run" / "environment.json"
    about = json.loads(file.read_text())
    # A small run would not compile of itself, and takes what this machine is fast at.
    other = "fp32" if about["auto"]["precision"] == "bf16" else "bf16"
    about["auto"] |= {"precision": other, "threads": 1}
    file.write_text(json.dumps(about))
    assert f"cpu, {other}, eager, 1 thread" in carry_out(recipe, tmp_path / "run")
    assert json.loads(file.read_text()) == about


def test_the_threads_of_a_run_are_its_own(tmp_path):
    threads = torch.get_num_threads()
    interrupt(small(), tmp_path / "run", 1)
    file = tmp_path / "run" / "environment.json"
    about = json.loads(file.read_text())
    about["auto"]["threads"] = threads + 1
    file.write_text(json.dumps(about))
    assert f"eager, {threads + 1} threads" in carry_out(small(), tmp_path / "run")
    assert torch.get_num_threads() == threads


def test_decisions():
    from attention_transfer.runtime.resolve import resolve_runtime

    auto = {"device": "auto", "precision": "auto", "compile": "auto"}
    earlier = {"device": "cpu", "precision": "bf16", "compile": True, "threads": 3, "graphs": False}
    assert asdict(resolve_runtime(small(**auto), 0.0, earlier)) == earlier
    explicit = small(device="cpu", precision="fp32", compile="off")
    assert asdict(resolve_runtime(explicit, 1e30, earlier)) == earlier | {
        "precision": "fp32",
        "compile": False,
    }
    assert not resolve_runtime(small(device="cpu", compile="auto"), 1e6).compile
    assert resolve_runtime(small(device="cpu", compile="auto"), 1e18).compile == can_compile("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: not available .*; available: cpu"):
            resolve_runtime(small(device="cuda"), 0.0)


# A process that sends a real signal to itself at a given step, so that no test has to wait for it.
SIGNALLED = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv.pop(1))
number, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
import pytest, small_runs
patch = pytest.MonkeyPatch()
small_runs.stop_after(patch, step, lambda loop: os.kill(os.getpid(), number))
sys.argv[0] = "attention-transfer"
from attention_transfer.cli import main
main()
"""


def test_signals(teacher_run, command, tmp_path, request):
    """Ctrl-C in the first epoch, killed in the second, then to the end."""

    def signalled(number, step):
        words = [
            sys.executable,
            "-c",
            SIGNALLED,
            str(request.config.rootpath / "tests"),
            str(int(number)),
            str(step),
        ]
        return subprocess.run(
            [*words, *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    line = f"train --model wrn-10-1 {FLAGS} --out run"
    said = signalled(signal.SIGINT, 2)
    assert said.returncode == 130
    assert said.stderr.startswith("attention-transfer: interrupted: the state is saved")
    assert said.stderr.count("\n") == 1
    assert saved_step(tmp_path / "run") == 2

    killed = signalled(signal.SIGKILL, STEPS_PER_EPOCH + 2)
    assert killed.returncode == -signal.SIGKILL
    assert f"continuing run at step 2 of {TOTAL}" in killed.stdout
    assert saved_step(tmp_path / "run") == STEPS_PER_EPOCH

    said = command(line)
    assert (said.status, said.err) == (0, "")
    assert f"continuing run at step {STEPS_PER_EPOCH} of {TOTAL}" in said.out
    assert_same_end(tmp_path / "run", teacher_run)


# A process that sends SIGTERM to itself when it first calls a function of the run.
SIGNALLED_AT = """
import importlib, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
module, name = sys.argv.pop(1).rsplit(".", 1)
import small_runs
module = importlib.import_module(module)
original = getattr(module, name)

def watched(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)

setattr(module, name, watched)
sys.argv[0] = "attention-transfer"
from attention_transfer.cli import main
main()
"""


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("train.run.assemble", "nothing is saved yet; run the same command again to start anew"),
        ("train.run.finish", "the last checkpoint is kept; run the same command again to continue"),
    ],
)
def test_sigterm_outside_the_training_loop(tmp_path, request, place, kept):
    words = [sys.executable, "-c", SIGNALLED_AT, str(request.config.rootpath / "tests")]
    line = f"train --model {write_factory(tmp_path)} {FLAGS} --max-steps 1 --out run"
    said = subprocess.run(
        [*words, f"attention_transfer.{place}", *line.split()],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (said.returncode, said.stderr) == (130, f"attention-transfer: interrupted: {kept}\n")
    assert (tmp_path / "run").exists() == ("last checkpoint" in kept)
