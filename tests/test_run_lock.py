"""One process writes to a run folder; its lock ends with it, however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import carry_out, small

from attention_transfer.errors import RunError, UserError
from attention_transfer.run_folder import RunFolder

OWNER = """
import os, sys, time
from attention_transfer.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock:
    owner = os.getpid()
    # The forked process speaks: it has given the lock up by then.
    if sys.argv[2] == "alone" or os.fork() == 0:
        print(owner, flush=True)
    time.sleep(600)
"""


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def start_owner(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    """A process that holds the lock of `folder`."""
    command = [sys.executable, "-c", OWNER, str(folder), how]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == f"{owner.pid}\n"
    return owner


def kill_all_of(owner: subprocess.Popen[str]) -> None:
    os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path):
    owner = start_owner(tmp_path / "run")
    try:
        expected = f"is being written by process {owner.pid} on .+ since 20..-..-.. ..:..:..: wait"
        with pytest.raises(UserError, match=expected), RunFolder(tmp_path / "run").lock:
            pass
    finally:
        kill_all_of(owner)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_ends_with_its_owner(tmp_path):
    """Also where the owner has forked processes, as a loader of images does."""
    owner = start_owner(tmp_path / "run", "forked")
    owner.kill()
    owner.wait()
    try:
        with RunFolder(tmp_path / "run").lock:
            pass
    finally:
        kill_all_of(owner)


def test_what_took_the_lock_leaves_no_trace(tmp_path):
    (tmp_path / "there").mkdir()
    for run in ("there", "new", "deep/er/run"):
        with RunFolder(tmp_path / run).lock:
            assert f"{run}/.lock" in files(tmp_path)
    assert files(tmp_path) == ["there"]


def test_what_was_written_stays(tmp_path):
    with RunFolder(tmp_path / "run").lock:
        (tmp_path / "run" / "config.yaml").write_text("")
    assert files(tmp_path) == ["run", "run/config.yaml"]


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed(tmp_path, again):
    """Or removed and locked again, by another run."""
    run, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with run.lock:
        run.lock.check()
        (tmp_path / "run").rename(tmp_path / "moved")
        if again:
            other.lock.__enter__()
        with pytest.raises(RunError, match="was removed or replaced while the run was writing"):
            run.lock.check()
    assert (tmp_path / "run" / ".lock").exists() == again


def test_a_lock_that_a_killed_process_left_in_a_finished_run(teacher_run, tmp_path):
    shutil.copytree(teacher_run, tmp_path / "run")
    (tmp_path / "run" / ".lock").touch()
    assert "is finished" in carry_out(small(), tmp_path / "run")
    assert files(tmp_path / "run") == files(teacher_run)


def test_the_lock_of_a_living_process_stays(tmp_path):
    owner = start_owner(tmp_path)
    RunFolder(tmp_path).lock.remove_abandoned()
    assert files(tmp_path) == [".lock"]
    owner.kill()
    owner.wait()
    RunFolder(tmp_path).lock.remove_abandoned()
    assert files(tmp_path) == []
