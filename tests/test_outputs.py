"""Where commands write: what they follow, what they write to, and what they do not replace."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import contents

from attention_transfer.errors import UserError
from attention_transfer.outputs import check_output
from attention_transfer.report import check_report
from attention_transfer.run_folder import remove_partial_files, replacing, write_json

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff\xe0"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.json", tmp_path / "a.json"
    target.write_text("{}")
    link.symlink_to(target)
    write_json(link, {"x": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"x": 1}
    assert os.listdir(target.parent) == ["a.json"]


def test_a_link_to_nothing_makes_its_target(tmp_path):
    (tmp_path / "a.json").symlink_to("b.json")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").is_symlink() and (tmp_path / "b.json").is_file()


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", {"x": 1})
    reader.join()
    assert json.loads(read[0]) == {"x": 1}
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_device_stays_a_device(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except PermissionError:
        pytest.skip("this file system has no devices")
    write_json(device, {"x": 1})
    assert stat.S_ISCHR(device.stat().st_mode)


STDOUT = """
import sys
from pathlib import Path
from attention_transfer.run_folder import write_json
print("before")
write_json(Path(sys.argv[1]), {})
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_stdout_into_a_file(tmp_path, name):
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", STDOUT, name], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\n{}\nafter\n"


def test_the_error_names_the_users_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError) as raised:
        write_json(tmp_path / "a", {})
    assert raised.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="too long"):
        write_json(tmp_path / ("a" * 300), {})


def test_a_file_of_another_kind_is_kept(tmp_path):
    file = tmp_path / "photo.png"
    for kind, content in (("json", JPEG), ("html", PNG), ("png", b"{}"), ("safetensors", PNG)):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"--json .*photo.png exists and is no {kind} file"):
            check_output("--json", file, kind, force=False)
        check_output("--json", file, kind, force=True)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("json", b'{"x": 1}'),
        ("html", b"<!DOCTYPE html>"),
        ("png", PNG),
        ("svg", b"<?xml version"),
        ("pdf", b"%PDF-1.4"),
        ("safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("onnx", b"\x08\x0a"),
        ("onnx", b""),
    ],
)
def test_a_file_of_the_same_kind_is_replaced(tmp_path, kind, content):
    (tmp_path / "file").write_bytes(content)
    check_output("--out", tmp_path / "file", kind, force=False)


def test_what_is_read_is_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="is also read"):
        check_output("--out", tmp_path / "a.png", "png", False, [tmp_path / "." / "a.png"])


@pytest.mark.parametrize("name", [".", "..", "folder", "/"])
def test_a_folder_is_no_output(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for force in (False, True):
        with pytest.raises(UserError, match="is a folder: name the file to write"):
            check_output("--json", Path(name), "json", force)


def test_only_an_exported_program_is_replaced_by_one(tmp_path):
    """A NumPy archive and a document are ZIP archives, too."""
    file = tmp_path / "mine.pt2"
    np.savez(tmp_path / "mine.npz", x=np.ones(3))
    (tmp_path / "mine.npz").rename(file)
    with pytest.raises(UserError, match="exists and is no pt2 file"):
        check_output("--out", file, "pt2", force=False)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 255  # the version of ZIP that reads it
    file.write_bytes(content)
    with pytest.raises(UserError, match="exists and is no pt2 file"):
        check_output("--out", file, "pt2", force=False)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, file)
    check_output("--out", file, "pt2", force=False)


def test_two_processes_do_not_share_a_partial_file(tmp_path, monkeypatch):
    with replacing(tmp_path / "a.json") as first:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "a.json") as second:
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "a.json").read_text() == "second"
    assert (tmp_path / "a.json").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with replacing(tmp_path / "b.json") as partial:
        partial.write_text("{}")
        own = partial.name
    host = own.split(".")[3].partition("-")[0]
    other_host = f".a.json.{'0' * 8}-{ended.pid}.partial"
    kept = {own, other_host, "mine.partial", ".mine.partial", f".mine.{host}-².partial"}
    for name in (f".a.json.{host}-{ended.pid}.partial", *kept):
        (tmp_path / name).write_text("half")
    remove_partial_files(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*kept, "b.json"}


def test_the_next_write_of_a_file_removes_what_a_killed_process_left_of_it(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with replacing(tmp_path / "a[1].json") as partial:
        partial.write_text("{}")
        left = partial.name.replace(f"-{os.getpid()}.", f"-{ended.pid}.")
    other = left.replace("a[1]", "b")
    for name in (left, other):
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "a[1].json", {})
    assert {file.name for file in tmp_path.iterdir()} == {other, "a[1].json"}


@pytest.mark.parametrize("line", ["train --model wrn-10-1 --seeds 2 --out out", "demo --out out"])
def test_somebodys_page_is_no_report(command, tmp_path, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("<!doctype html><title>Mine</title>")
    said = command(line)
    assert said.status == 2 and "report.html exists, and is no report of this tool" in said.err
    assert contents(tmp_path / "out").keys() == {"report.html"}


def test_a_report_is_replaced(student_run):
    check_report(student_run / "report.html", force=False)


def test_text_that_only_begins_like_json(tmp_path):
    (tmp_path / "settings.toml").write_text("[build-system]\nrequires = []\n")
    with pytest.raises(UserError, match="exists and is no json file"):
        check_output("--json", tmp_path / "settings.toml", "json", False)


def test_what_is_below_a_folder_that_is_read_is_kept(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(PNG)
    with pytest.raises(UserError, match="is also read"):
        check_output("--out", tmp_path / "cat" / "a.png", "png", False, [tmp_path])


def test_a_file_in_a_store_is_kept(tmp_path):
    for name in ("store.json", "logits.npy"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name} is in a store"):
            check_output("--json", tmp_path / name, "json", False)


@pytest.mark.parametrize("name", ["summary.json", "student.safetensors", "seed-1/summary.json"])
def test_the_run_that_a_command_will_write_is_kept(tmp_path, name):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is the run's own"):
        check_output("--json", out / name, "json", False, out=out)
    with pytest.raises(UserError, match="is a folder"):
        check_output("--json", out, "json", False, out=out)
    check_output("--json", out / "numbers.json", "json", False, out=out)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"mine is a file, not a folder"):
        check_output("--json", tmp_path / "mine" / "a.json", "json", force=True)


def test_every_file_of_a_run_is_kept(student_run):
    for name in [*contents(student_run), "logs/state.json", "summary.json"]:
        for kind in ("json", "html", "png", "onnx"):
            with pytest.raises(UserError, match="is the run's own"):
                check_output("--out", student_run / name, kind, force=False)
        check_output("--out", student_run / name, "json", force=True)
    check_output("--out", student_run / "mine.json", "json", force=False)


def test_a_link_into_a_run_is_no_way_round(student_run, tmp_path):
    (tmp_path / "a.json").symlink_to(student_run / "summary.json")
    with pytest.raises(UserError, match="is the run's own"):
        check_output("--json", tmp_path / "a.json", "json", force=False)


def test_an_unfinished_run_is_not_marked_as_finished(tmp_path):
    (tmp_path / "config.yaml").write_text("model: wrn-10-1\n")
    with pytest.raises(UserError, match="is the run's own"):
        check_output("--json", tmp_path / "summary.json", "json", force=False)


COMMANDS = (
    "evaluate {run} --device cpu --json {out}",
    "predict {run} photo.png --device cpu --json {out}",
    "export {run} --format safetensors --out {out}",
    "maps {run} --images photo.png --out {out}",
    "compare {run} --out {out}",
)


@pytest.mark.parametrize("line", COMMANDS)
def test_no_command_replaces_a_file_of_its_run(command, student_run, tmp_path, line):
    (tmp_path / "photo.png").write_bytes(PNG)
    before = contents(student_run)
    for name in ("student.safetensors", "checkpoint.pt", "config.yaml", "summary.json"):
        said = command(line.format(run=student_run, out=student_run / name))
        assert said.status == 2 and name in said.err and len(said.err.splitlines()) == 1
    assert contents(student_run) == before
    assert (tmp_path / "photo.png").read_bytes() == PNG


def test_force_is_what_a_person_means(command, student_run, tmp_path):
    (tmp_path / "a.json").write_text("mine")
    line = f"evaluate {student_run} --limit-val 10 --device cpu --json a.json"
    assert command(line).status == 2 and (tmp_path / "a.json").read_text() == "mine"
    assert command(f"{line} --force").status == 0
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 10


def test_numbers_into_stdout(command, student_run):
    said = command(f"evaluate {student_run} --limit-val 10 --device cpu --json /dev/stdout")
    assert said.status == 0 and '"images": 10' in said.out
