"""What `train` and `distill` say at the end."""

from __future__ import annotations

import json
import shutil

from attention_transfer.next_steps import next_steps
from attention_transfer.run_folder import RunFolder


def test_a_student_is_there_to_be_used(student_run):
    folder = RunFolder(student_run)
    lines = next_steps(folder.path, [folder])
    assert f"weights: {folder.student_file}" in lines
    assert f"predict {student_run} IMAGE" in lines[-1]
    assert folder.student_file.is_file() and folder.report_file.is_file()


def test_a_trained_network_can_teach(teacher_run):
    folder = RunFolder(teacher_run)
    assert f"distill --teacher {teacher_run} " in next_steps(folder.path, [folder])[-1]


def test_the_next_command_has_the_data_and_the_trust_that_it_needs(teacher_run, tmp_path):
    folder = RunFolder(shutil.copytree(teacher_run, tmp_path / "run"))
    folder.write_config(folder.config() | {"data": "folder:my photos", "image_size": 48})
    summary = folder.summary() | {"model": "net.py:make"}
    folder.summary_file.write_text(json.dumps(summary))
    last = next_steps(folder.path, [folder])[-1]
    assert " --data 'folder:my photos' --image-size 48 --trust-code --out OUT" in last


def test_a_student_that_is_better_than_its_teacher_is_noted(student_run, tmp_path):
    folder = RunFolder(shutil.copytree(student_run, tmp_path / "run"))
    for teacher, student, count in ((0.5, 0.75, 1), (0.75, 0.5, 0)):
        summary = folder.summary()
        summary["teacher"]["val_accuracy"], summary["final"]["val_accuracy"] = teacher, student
        folder.summary_file.write_text(json.dumps(summary))
        lines = next_steps(folder.path, [folder])
        assert sum(line.startswith("note: the student is better") for line in lines) == count
        assert sum("try --method at" in line for line in lines) == count  # the run's is at+kd
