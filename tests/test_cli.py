"""The command line: what it does, and what it says of a person's mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from small_runs import FLAGS, Command, contents, rows, write_factory, write_folder, write_parquet

from attention_transfer.config import recipe_names

PNG = b"\x89PNG\r\n\x1a\n"
TRAIN = f"train --model wrn-10-1 {FLAGS}"
DISTILL = f"distill --student wrn-10-1 {FLAGS}"
COMMANDS = (
    "demo",
    "train",
    "distill",
    "evaluate",
    "compare",
    "maps",
    "stages",
    "predict",
    "export",
)


@pytest.fixture
def mistake(command: Command, tmp_path):
    """Runs a wrong command line: status 2, one line on stderr with these words, no file touched."""

    def check(line: str, *words: str) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        before = contents(tmp_path)
        said = command(line)
        assert said.status == 2
        assert re.fullmatch(r"attention-transfer: [^\n]+\n", said.err)
        assert "Traceback" not in said.out + said.err
        for word in words:
            assert word in said.err
        assert contents(tmp_path) == before

    return check


# What is quick to start and to say


NO_TORCH = """
import sys
import attention_transfer
assert "torch" not in sys.modules
from attention_transfer import cli
for name in ("", *cli.COMMANDS):
    sys.argv = ["attention-transfer", *name.split(), "--help"]
    try:
        cli.main()
    except SystemExit as leaving:
        assert leaving.code in (0, None), name
assert not {"torch", "numpy", "lightning", "rich", "yaml"} & set(sys.modules), sys.modules.keys()
"""


def test_help_and_the_import_need_no_torch():
    said = subprocess.run(
        [sys.executable, "-c", NO_TORCH], capture_output=True, text=True, timeout=60
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert all(
        f"usage: attention-transfer {name} " in said.stdout for name in ("[--help]", *COMMANDS)
    )


def test_without_a_word_it_helps(command):
    said = command("")
    assert (said.status, said.err) == (0, "")
    assert all(name in said.out for name in COMMANDS)


@pytest.mark.parametrize("name", ["train", "distill"])
def test_the_help_lists_the_recipes(command, name):
    words = command(f"{name} --help").out.replace("\n", " ").split()
    assert {f"{recipe}," for recipe in recipe_names()[:-1]} <= set(words)


def test_version(command):
    import attention_transfer

    assert attention_transfer.__version__ in command("--version").out


# What is wrong with the words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", ["unknown command 'trian'; did you mean train?"]),
        (f"{TRAIN} --out x --epoch 3", ["--epoch", "--epochs"]),
        (f"{TRAIN} --out x extra", ["extra"]),
        (TRAIN, ["--out"]),
        (f"train {FLAGS} --out x", ["no network named", "--model"]),
        (f"{TRAIN} --out x --model wrn-16-l", ["'wrn-16-l'", "did you mean", "wrn-16-1"]),
        (f"{TRAIN} --out x --model wrn-17-1", ["17", "6n + 4", "wrn-16-1"]),
        (f"{TRAIN} --out x --model wrn-16-0", ["width is 0"]),
        (f"{TRAIN} --out x --model wrn-1000000-1", ["wrn-1000000-1", "at most 10000"]),
        (f"{TRAIN} --out x --model wrn-1000000000000000-1", ["at most 10000"]),
        (f"{TRAIN} --out x --model wrn-16-100000", ["wrn-16-100000", "parameters", "at most"]),
        (f"{TRAIN} --out x --jobs 5", ["--jobs is 5", "--seeds"]),
        (f"{TRAIN} --out {'a' * 5000}", ["aaa…aaa", "File name too long"]),
        (f"evaluate {'a' * 5000}", ["aaa…aaa", "File name too long"]),
        (f"compare {'a' * 5000}", ["aaa…aaa", "File name too long"]),
        (f"predict {'a' * 5000} mine.txt", ["aaa…aaa", "File name too long"]),
        ("stages wrn-10-1 --image-size -1", ["image_size is -1"]),
        (f"{TRAIN} --out x --model timm/resnet81", ["resnet81", "did you mean"]),
        (f"{TRAIN} --out x --model nothing.py:make", ["nothing.py"]),
        (f"{TRAIN} --out x --recipe cifar10-shor", ["cifar10-shor", "did you mean cifar10-short"]),
        (f"{TRAIN} --out x --config nofile.yaml", ["nofile.yaml", "No such file"]),
        (f"{TRAIN} --out x --data digit", ["did you mean digits?"]),
        (f"{TRAIN} --out x --seeds 0", ["seeds is 0"]),
        (f"{TRAIN} --out x --epochs -1", ["epochs is -1"]),
        (f"{TRAIN} --out x --epochs 1.5", ["epochs is 1.5", "whole number"]),
        (f"{TRAIN} --out x --batch-size 0", ["batch_size is 0"]),
        (f"{TRAIN} --out x --max-steps 0", ["max_steps is 0"]),
        (f"{TRAIN} --out x --limit-train 0", ["limit_train is 0"]),
        (f"{TRAIN} --out x --lr nan", ["lr is nan"]),
        (f"{TRAIN} --out x --lr 0", ["lr is 0"]),
        (f"{TRAIN} --out x --lr fast", ["'fast'"]),
        (f"{TRAIN} --out x --weight-decay inf", ["weight_decay is inf"]),
        (f"{TRAIN} --out x --momentum nan", ["momentum is nan"]),
        (f"{TRAIN} --out x --lr-decay -1", ["lr_decay is -1"]),
        (f"{TRAIN} --out x --val-split nan", ["val_split", "nan"]),
        (f"{TRAIN} --out x --val-split 1", ["val_split", "1"]),
        (f"{TRAIN} --out x --crop-padding 32", ["crop_padding is 32", "32x32"]),
        (f"{TRAIN} --out x --crop-padding -1", ["crop_padding is -1"]),
        (f"{TRAIN} --out x --milestones 1,b", ["milestones is '1,b'"]),
        (f"{TRAIN} --out x --seed 99999999999999999999", ["seed is 99999999999999999999"]),
        (f"{TRAIN} --out x --schedule onecycle", ["did you mean one-cycle?"]),
        (f"{TRAIN} --out x --device gpu", ["device is 'gpu'", "cpu, cuda"]),
        (f"{TRAIN} --out x --precision fp16", ["'fp16'", "bf16"]),
        (f"{TRAIN} --out x --compile maybe", ["'maybe'"]),
        (f"{TRAIN} --out x --on-bad-image ignore", ["'ignore'", "skip"]),
        (f"{TRAIN} --out x --student-weights none.pt", ["none.pt"]),
        (f"{TRAIN} --out mine.txt", ["mine.txt is a file"]),
        (f"{TRAIN} --out mine.txt/run", ["mine.txt is a file"]),
        (f"{TRAIN} --out mine.txt --seeds 2", ["mine.txt is a file"]),
        (f"{TRAIN} --out .", ["holds no run"]),
        (f"{TRAIN} --teacher t --out x", ["--teacher"]),
        (f"{DISTILL} --out x --method atkd", ["unknown method 'atkd'", "did you mean"]),
        (f"{DISTILL} --out x --method kd+kd", ["twice"]),
        (f"{DISTILL} --out x --method kd", ["needs --teacher"]),
        (
            f"{DISTILL} --out x --method kd --teacher wrn-10-1",
            ["no trained weights", "--teacher-weights"],
        ),
        (f"{DISTILL} --out x --method kd --teacher runs/teacher", ["runs/teacher"]),
        (f"{DISTILL} --out x --method kd --teacher nowhere", ["nowhere"]),
        (f"{DISTILL} --out x --method kd --teacher .", ["not a run folder"]),
        (
            f"{TRAIN} --out x --milestones 1",
            ["--milestones is given", "--schedule one-cycle", "--schedule step"],
        ),
        (f"{TRAIN} --out x --schedule cosine --lr-decay 0.1", ["--lr-decay is given", "cosine"]),
        (
            f"{TRAIN.replace('--compile off', '')} --out x --compile graphs",
            ["need a GPU", "choose --compile on"],
        ),
        ("demo --seeds 0", ["seeds is 0"]),
        ("bench step --compile graphs", ["compile is 'graphs': expected one of on, off"]),
        ("bench step --data photos", ["--data is given, but bench step does not read it"]),
        ("demo --out mine.txt", ["mine.txt is a file"]),
        ("evaluate nowhere", ["nowhere does not exist"]),
        ("evaluate .", ["not a run folder"]),
        ("compare nowhere", ["no run in nowhere"]),
        ("compare", ["RUNS"]),
        ("compare . --device cpu", ["--device does nothing without --speed"]),
        ("compare . --title Mine", ["--title does nothing without --out"]),
        (f"compare . --json {'a/' * 300}b", ["json is ", "expected a path of at most 256 folders"]),
        ("compare . --json \ud800", ["json is '\\ud800'", "expected valid Unicode text"]),
        ("compare . --out ' '", ["out is ' '", "expected text that is not blank"]),
        ("compare ' ' --title Mine", ["runs is ' '", "expected text that is not blank"]),
        ("evaluate ' '", ["network is ' '", "expected text that is not blank"]),
        ("study cost --batch-size 0 --out s", ["batch_size is 0"]),
        ("stages wrn-16-l", ["did you mean", "wrn-16-1"]),
        ("stages .", ["not a run folder"]),
        ("maps wrn-10-1 --images nowhere --out m.png", ["nowhere"]),
        ("maps wrn-10-1 --images mine.txt --out m.png", ["mine.txt"]),
        ("maps wrn-10-1 --images . --out m.png", ["no image in ."]),
        ("maps wrn-10-1 --images digits --limit 0 --out m.png", ["limit is 0"]),
        ("maps wrn-10-1 --images digits --p 0 --out m.png", ["p is 0"]),
        ("maps wrn-10-1 --images digits --kind mean --out m.png", ["'mean'", "sum, max"]),
        ("maps wrn-10-1 --images digits --limit 1 --out mine.txt/m.png", ["mine.txt"]),
    ],
)
def test_wrong_words(mistake, line, words):
    mistake(line, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--convention author", ["did you mean authors?"]),
        ("--kind men", ["'men'", "sum, max"]),
        ("--resize maps", ["did you mean map?"]),
        ("--decay lin", ["did you mean linear?"]),
        ("--p 0.5", ["p is 0.5"]),
        ("--norm nan", ["norm is nan"]),
        ("--beta nan", ["beta is nan"]),
        ("--beta much", ["'much'"]),
        ("--beta kd=1", ["'kd'", "beta"]),
        ("--alpha 2 --method kd", ["alpha is 2"]),
        ("--temperature 0 --method kd", ["temperature is 0"]),
        ("--pairs group0", ["--pairs is 'group0'"]),
        ("--pairs group0=block9", ["block9"]),
    ],
)
def test_wrong_options_of_methods(mistake, teacher_run, options, words):
    mistake(f"{DISTILL} --out x --method at --teacher {teacher_run} {options}", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown option 'epoch'", "did you mean epochs"]),
        ("seed: many", ["seed is 'many'", "whole number"]),
        ("lr: [1]", ["lr is [1]"]),
        ("nesterov: 1", ["nesterov is 1"]),
        ("milestones: [a]", ["milestones is ['a']"]),
        ("schedule: onecycle", ["did you mean one-cycle?"]),
        ("- 3", ["holds a list"]),
        ("a: [", ["is not YAML"]),
        ("!!python/object/apply:os.system ['true']", ["is not YAML"]),
    ],
)
def test_a_wrong_recipe(mistake, tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    mistake(f"{TRAIN} --out x --config mine.yaml", *words)


# What is wrong with the files


def test_a_teacher_with_other_classes(mistake, teacher_run, tmp_path):
    words = f"--method kd --teacher {teacher_run} --data folder:data"
    data = write_folder(tmp_path / "data", classes=3)
    mistake(f"{DISTILL} --out x {words}", "10 classes", "3")
    shutil.rmtree(data)
    write_folder(data, classes=10)
    mistake(f"{DISTILL} --out x {words}", "has the classes 0, 1", "class00")


def test_a_teacher_that_is_not_finished(mistake, teacher_run, tmp_path):
    shutil.copytree(teacher_run, tmp_path / "t")
    (tmp_path / "t" / "student.safetensors").unlink()
    mistake(f"{DISTILL} --out x --method kd --teacher t", "not finished")
    (tmp_path / "t" / "student.safetensors").write_bytes(b"damaged")
    mistake(f"{DISTILL} --out x --method kd --teacher t", "student.safetensors")


def test_missing_and_empty_data_folders(mistake, tmp_path):
    for kind in ("folder", "parquet", "cifar10"):
        mistake(f"{TRAIN} --out x --data {kind}:nowhere", "nowhere")
    (tmp_path / "empty").mkdir()
    for kind in ("folder", "parquet", "cifar10"):
        mistake(f"{TRAIN} --out x --data {kind}:empty", "empty")
    (tmp_path / "empty" / "train").mkdir()
    (tmp_path / "empty" / "val").mkdir()
    mistake(f"{TRAIN} --out x --data folder:empty", "empty")


def test_a_class_that_is_missing_in_val(mistake, tmp_path):
    data = write_folder(tmp_path / "data", classes=3)
    shutil.rmtree(data / "val" / "class01")
    mistake(f"{TRAIN} --out x --data folder:data", "val", "class01")


def test_a_truncated_image(mistake, command, tmp_path):
    data = write_folder(tmp_path / "data", classes=3, train=8)
    image = data / "train" / "class01" / "bad.jpg"
    Image.effect_noise((32, 32), 50).convert("RGB").save(image)
    image.write_bytes(image.read_bytes()[:600])
    line = f"{TRAIN} --out x --data folder:data"
    mistake(line, str(image.relative_to(tmp_path)), "skip")
    said = command(f"{line} --on-bad-image skip")
    assert (said.status, said.err) == (0, "")
    assert "warning: 1 unreadable images were left out" in said.out
    assert "24 training and 6 validation images" in said.out
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["skipped_images"] == 1


def test_a_label_out_of_range(mistake, tmp_path):
    write_parquet(tmp_path / "data", [0, 1, 2, 1], classes=2)
    mistake(
        f"{TRAIN} --out x --data parquet:data",
        "validation-00000-of-00001.parquet, row 2",
        "label 2",
        "0 to 1",
    )


def test_a_different_run_is_refused(mistake, teacher_run, tmp_path):
    shutil.copytree(teacher_run, tmp_path / "run")
    mistake(
        f"{TRAIN} --out run --lr 0.3 --seed 4",
        "lr is 0.2 in that run, 0.3 in this command",
        "seed is 0 in that run, 4 in this command",
    )


# What it does


def test_evaluate(command, student_run, tmp_path):
    said = command(f"evaluate {student_run} --device cpu --json found.json")
    accuracy = rows(student_run)[-1]["val_accuracy"]
    assert (said.status, said.err) == (0, "")
    assert f"error {100 * (1 - accuracy):.2f} %" in said.out
    assert "on 100 images" in said.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["accuracy"] == accuracy
    attention = json.loads((student_run / "summary.json").read_text())["attention"]
    assert found["attention"] == attention
    text = f"attention of the last stage: {100 * attention['in_box'][-1]:.1f} % in the box"
    assert text in said.out and f"on {attention['images']} images" in said.out


def test_evaluate_on_other_data(command, mistake, teacher_run, tmp_path):
    said = command(f"evaluate {teacher_run} --device cpu --data digits --limit-val 30")
    assert "on 30 images" in said.out
    write_folder(tmp_path / "data", classes=10)
    mistake(
        f"evaluate {teacher_run} --device cpu --data folder:data", "class00", "expected the same"
    )


def test_seeds(command, tmp_path):
    model = write_factory(tmp_path)
    line = f"train --model {model} {FLAGS} --max-steps 2 --seed 3 --seeds 2 --out run"
    assert command(line).status == 0
    assert {f.name for f in (tmp_path / "run").iterdir()} == {"seed-3", "seed-4", "report.html"}
    for seed in (3, 4):
        assert (
            yaml.safe_load((tmp_path / "run" / f"seed-{seed}" / "config.yaml").read_text())["seed"]
            == seed
        )
    assert rows(tmp_path / "run" / "seed-3") != rows(tmp_path / "run" / "seed-4")
    said = command(line)
    assert said.status == 0
    assert said.out.count("is finished") == 2


def configured(tmp_path):
    return yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_flags_override_the_file_and_the_file_the_recipe(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "weight-decay: 1e-3\nepochs: 7\nlimit_train: 64\nflip: false\ncompile: off\n"
    )
    model = write_factory(tmp_path)
    line = f"train --model {model} --recipe cifar10-paper --config mine.yaml"
    line += " --data digits --epochs 1 --limit-val 10"
    said = command(f"{line} --device cpu --out run")
    assert (said.status, said.err) == (0, "")
    found = configured(tmp_path)
    assert (found["schedule"], found["lr"], found["nesterov"]) == (
        "step",
        0.1,
        False,
    )  # the recipe's
    assert (found["weight_decay"], found["limit_train"], found["compile"]) == (
        1e-3,
        64,
        "off",
    )  # the file's
    assert (found["epochs"], found["limit_val"]) == (1, 10)  # the flags'
    assert (found["momentum"], found["seed"]) == (0.9, 0)  # the defaults


def test_the_configuration_runs_again(command, teacher_run, tmp_path):
    said = command(f"train --config {teacher_run / 'config.yaml'} --out run")
    assert (said.status, said.err) == (0, "")
    assert configured(tmp_path) == yaml.safe_load((teacher_run / "config.yaml").read_text())
    assert rows(tmp_path / "run") == rows(teacher_run)


def test_a_students_run_on_its_teachers_configuration(
    command, mistake, teacher_run, student_run, tmp_path
):
    words = (
        f"--config {teacher_run / 'config.yaml'} --teacher {teacher_run} --method kd --max-steps 1"
    )
    said = command(f"distill {words} --out run")
    assert (said.status, said.err) == (0, "")
    assert (configured(tmp_path)["command"], configured(tmp_path)["method"]) == ("distill", "kd")
    mistake(
        f"train --config {student_run / 'config.yaml'} --out x",
        "for a teacher and a method use distill",
    )


def flips(monkeypatch, command, line):
    """Whether the run mirrors images: what it hands to the augmentation."""
    from attention_transfer.train import images

    original, seen = images.Augment, []

    def watched(images, padding, flip, *views):
        seen.append(flip)
        return original(images, padding, flip, *views)

    with monkeypatch.context() as patch:
        patch.setattr(images, "Augment", watched)
        assert command(line).status == 0
    return seen.pop()


def test_digits_are_not_mirrored_unless_asked(command, monkeypatch, tmp_path):
    model = write_factory(tmp_path)
    line = f"train --model {model} {FLAGS} --max-steps 1"
    assert flips(monkeypatch, command, f"{line} --out a") is False
    assert flips(monkeypatch, command, f"{line} --out b --flip") is True
    write_folder(tmp_path / "data", classes=3)
    assert flips(monkeypatch, command, f"{line} --out c --data folder:data") is True
    assert flips(monkeypatch, command, f"{line} --out d --data folder:data --no-flip") is False


def test_a_beta_too_heavy_for_a_short_run_is_warned_of(command, teacher_run):
    line = f"{DISTILL} --method at --teacher {teacher_run} --max-steps 2"
    said = command(f"{line} --out a --beta 1000")
    assert said.status == 0
    assert "warning: β = 1000 is probably too large for 2 steps: try --beta" in said.out
    assert "too large" not in command(f"{line} --out b --beta 0.1").out
    assert "too large" not in command(f"{line} --out c").out


def test_compare(command, teacher_run, student_run, tmp_path):
    said = command(f"compare {teacher_run} {student_run} --out found/report.html")
    assert (said.status, said.err) == (0, "")
    for run in (teacher_run, student_run):
        assert f"{100 * (1 - rows(run)[-1]['val_accuracy']):.1f}" in said.out
    assert "report: found/report.html" in said.out
    page = (tmp_path / "found" / "report.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page) == []
    assert page.count("<html") == 1


def test_compare_says_what_is_unfinished(command, teacher_run, tmp_path):
    shutil.copytree(teacher_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    said = command("compare run")
    assert (said.status, said.err) == (0, "")
    assert "unfinished" in said.out


@pytest.mark.parametrize("images", ["digits", "folder", "file"])
def test_maps(command, teacher_run, student_run, tmp_path, images):
    folder = write_folder(tmp_path / "data", classes=3, train=1, val=1) / "train"
    words = {"digits": "digits", "folder": str(folder), "file": str(folder / "class00" / "0.png")}[
        images
    ]
    said = command(
        f"maps {teacher_run} {student_run} wrn-10-2 --images {words} --limit 2 --out found/maps.png"
    )
    assert (said.status, said.err) == (0, "")
    count = "1 image" if images == "file" else "2 images"
    assert f"{count} × 3 networks: found/maps.png" in said.out
    assert (tmp_path / "found" / "maps.png").read_bytes().startswith(PNG)


def test_stages(command, teacher_run):
    said = command(f"stages {teacher_run} wrn-16-2")
    assert (said.status, said.err) == (0, "")
    for word in ("group0", "group1", "group2", "32×32", "128", "stride 4 in both"):
        assert word in said.out
    assert "--pairs group0=group0,group1=group1,group2=group2" in said.out


def test_an_unforeseen_error_is_one_line_too(command, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr("attention_transfer.train.images.open_data", broken)
    said = command(f"{TRAIN} --out x")
    assert said.status == 1
    hint = "(ATTENTION_TRANSFER_TRACEBACK=1 shows where)"
    assert said.err == f"attention-transfer: ZeroDivisionError: by zero {hint}\n"
    monkeypatch.setenv("ATTENTION_TRANSFER_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        command(f"{TRAIN} --out x")


def test_weights_to_start_from(command, teacher_run, tmp_path):
    weights = teacher_run / "student.safetensors"
    said = command(
        f"{TRAIN} --student-weights {weights} --max-steps 1 --lr 1e-9 --weight-decay 0 --out run"
    )
    assert (said.status, said.err) == (0, "")
    from safetensors.torch import load_file

    before, after = load_file(weights), load_file(tmp_path / "run" / "student.safetensors")
    learnt = [name for name in before if before[name].is_floating_point() and "running" not in name]
    for name in learnt:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)
    teacher = f"--teacher wrn-10-1 --teacher-weights {weights}"
    said = command(f"{DISTILL} --method kd {teacher} --max-steps 1 --out kd")
    assert (said.status, said.err) == (0, "")
