"""Kills small runs at every call that changes a file and at random times; each must end the same.

    python tests/chaos.py                     at every change of every setting, and at random
    python tests/chaos.py --kills 300

A run that was killed, once or several times, is started again until it ends. Its weights, its
metrics and the files in its folder must be those of a run that was left alone, bit for bit.

A kill is a real SIGKILL to a real process. The process is a fork, so that PyTorch is imported once.
The report is one line, because drawing its charts would take most of the time.
`sys.addaudithook` tells of every opening, renaming, and removing of a file. A write is torn in the
middle by a limit on the size of files: the kernel then ends the process within the write.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads but its own

import pytest
import timm.utils  # noqa: F401 (imported here, not in each fork)
import torch
from small_runs import (
    _quick,
    carry_out,
    contents,
    distilled,
    rows,
    small,
    write_factory,
    write_folder,
)

from attention_transfer import launch
from attention_transfer.run_folder import replacing

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "chaos.fsync")
LONGEST_SECONDS = 600


class ChaosError(Exception):
    """A run that was killed ended otherwise than one that was left alone."""


@dataclass(frozen=True)
class Kill:
    """When a run is killed: before the so-manyth change of a file, within a write, or at a time."""

    change: int | None = None
    torn_at: int | None = None  # bytes of the file that the change opens, before the kill
    seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        if self.torn_at is not None:
            return f"{self.torn_at} bytes after change {self.change}"
        return f"at change {self.change}"

    @property
    def kind(self) -> str:
        if self.seconds is not None:
            return "at a time"
        return "at a change" if self.torn_at is None else "in a write"


@dataclass
class Setting:
    """A small run: `start` carries it out, or continues it, in a folder."""

    name: str
    start: Callable[[Path], Any]


@dataclass
class Reference:
    """What a run leaves that nobody killed."""

    folder: Path
    changes: list[str]  # the file of each change, in order, with the name of the call
    seconds: float


def settings(place: Path) -> Iterator[Setting]:
    """The runs, with what they need in `place`."""
    model = write_factory(place, "make_normalised")
    images = write_folder(place / "images", classes=4, train=16, val=4)
    teacher = place / "teacher"
    in_fork(lambda: carry_out(small(model=model, epochs=1), teacher))
    plain = {"model": model, "ema": 0.9, "mixup": 0.2}
    yield Setting("plain", lambda out: carry_out(small(**plain), out))
    for method in ("at+kd", "full", "gradient"):
        recipe = distilled(teacher, method, model=model, trust_code=True)
        yield Setting(method, lambda out, recipe=recipe: carry_out(recipe, out))
    streamed = {"data": f"folder:{images}", "image_size": 16, "stream": "on", "batch_size": 16}
    for workers in (0, 2):
        recipe = small(model=model, workers=workers, **streamed)
        name = f"streamed, {workers} workers"
        yield Setting(name, lambda out, recipe=recipe: carry_out(recipe, out))
    recipe = distilled(teacher, model=model, compile="on", trust_code=True)
    yield Setting("compiled", lambda out: carry_out(recipe, out))
    # The runs have two epochs, so that one run fills a store of two views.
    views = {"model": model, "trust_code": True, "views": 2}
    full = distilled(teacher, store=str(place / "full.store"), **views)
    in_fork(lambda: carry_out(full, place / "first"))
    yield Setting("full store", lambda out: carry_out(full, out))

    def fill(out: Path) -> str:
        return carry_out(distilled(teacher, store=str(store_of(out)), **views), out)

    yield Setting("filling store", fill)


def store_of(folder: Path) -> Path:
    """The store that a run fills, if it fills one of its own."""
    return folder.with_suffix(".store")


def write_short_report(runs: list[Any], out: Path) -> None:
    """In the place of `launch.write_report`."""
    with replacing(out) as partial:
        partial.write_text("<html>\n")


def in_fork(work: Callable[[], Any], log: Path | None = None, seconds: float | None = None) -> int:
    """Does `work` in a process of its own, killed after `seconds`; how it ended, as `waitpid` says.

    Args:
        log: what the process says; nowhere by default.
    """
    child = os.fork()
    if not child:
        _become(work, log)
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        spent = time.monotonic() - start
        if (seconds is not None and spent > seconds) or spent > LONGEST_SECONDS:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.005)


def _become(work: Callable[[], Any], log: Path | None) -> None:
    """The life of a fork."""
    status = 1
    try:
        output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        print(work(), flush=True)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def on_changes(folder: Path, act: Callable[[int, str], None]) -> None:
    """From now on calls `act` with number and name before each change of a file.

    The files are those of the run in `folder` and of the store that it fills.
    """
    count, ours = 0, {folder, store_of(folder)}
    fsync = os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in AUDITED or not isinstance(arguments[0], (str, Path)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        file = Path(os.path.abspath(arguments[0]))
        if ours & {file, *file.parents}:
            count += 1
            act(count, f"{event} {file.relative_to(folder.parent)}")

    def audited_fsync(descriptor: Any) -> None:
        sys.audit("chaos.fsync", str(folder))
        fsync(descriptor)

    sys.addaudithook(hook)
    os.fsync = audited_fsync


def leave_alone(setting: Setting, folder: Path) -> Reference:
    """Carries the run out, and notes each change of a file."""
    listed = folder.with_suffix(".changes")

    def work() -> None:
        with open(listed, "w") as stream:
            on_changes(folder, lambda number, name: print(name, file=stream, flush=True))
            setting.start(folder)

    start = time.monotonic()
    log = folder.with_suffix(".log")
    if in_fork(work, log):
        raise ChaosError(f"{setting.name}: the run left alone failed: {log.read_text()}")
    seconds = time.monotonic() - start
    return Reference(folder, listed.read_text().splitlines(), seconds)


def kill(setting: Setting, folder: Path, when: Kill) -> bool:
    """Carries the run out or continues it until it is killed; False if it ended before."""

    def act(number: int, name: str) -> None:
        if number != when.change:
            return
        if when.torn_at is None:
            os.kill(os.getpid(), signal.SIGKILL)
        # Python ignores the signal; by default it ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (when.torn_at, resource.RLIM_INFINITY))

    def work() -> None:
        on_changes(folder, act)
        setting.start(folder)

    return os.WIFSIGNALED(in_fork(work, seconds=when.seconds))


def end(setting: Setting, folder: Path, reference: Reference) -> None:
    """Continues the run to its end.

    Raises:
        ChaosError: if it fails, or leaves something else than the run that was left alone.
    """
    log = folder.with_suffix(".log")
    if in_fork(lambda: setting.start(folder), log):
        raise ChaosError(log.read_text())
    if rows(folder) != rows(reference.folder):
        raise ChaosError("other metrics")
    ours, theirs = contents(folder), contents(reference.folder)
    if ours["student.safetensors"] != theirs["student.safetensors"]:
        raise ChaosError("other weights")
    if ours.keys() != theirs.keys():
        raise ChaosError(f"other files: {sorted(ours.keys() ^ theirs.keys())}")
    state, expected = (
        torch.load(run / "checkpoint.pt", weights_only=True) for run in (folder, reference.folder)
    )
    for name, value in expected["transfer"].items():
        if not torch.equal(state["transfer"][name], value):
            raise ChaosError(f"other state: {name}")
    if contents(store_of(folder)) != contents(store_of(reference.folder)):
        raise ChaosError("another store")


def draw(reference: Reference, dice: random.Random) -> Kill:
    """A kill at random: as often before a change, within a write, and at a time."""
    kind = dice.randrange(3)
    if kind == 0:
        return Kill(seconds=dice.uniform(0, reference.seconds))
    change = dice.randrange(len(reference.changes)) + 1
    if kind == 1:
        return Kill(change)
    opened = [k for k, name in enumerate(reference.changes, 1) if name.startswith("open")]
    # Small files are torn, too: as many kills below 1 kB as in each larger power of ten.
    return Kill(dice.choice(opened), torn_at=int(10 ** dice.uniform(0, 5)))


def torment(setting: Setting, place: Path, kills: int | None, dice: random.Random) -> Counter[str]:
    """Kills runs of a setting, at each change in a random order and, every third time, at random.

    Args:
        kills: how often; by default until a run was killed at each change.

    Returns:
        The number of kills of each kind.
    """
    reference = leave_alone(setting, place / "alone")
    every = [Kill(number) for number in range(1, len(reference.changes) + 1)]
    dice.shuffle(every)
    done: Counter[str] = Counter()
    folder, killed = place / "run", []

    def enough() -> bool:
        return not every if kills is None else done.total() >= kills

    while not enough():
        # A run that continues has fewer changes, so it is killed at random.
        at_random = bool(killed) or not every or dice.random() < 1 / 3
        when = draw(reference, dice) if at_random else every.pop()
        if kill(setting, folder, when):
            done[when.kind] += 1
            killed.append(when)
            if dice.random() < 0.3 and not enough():
                continue  # the same run is killed once more
        try:
            end(setting, folder, reference)
        except ChaosError as error:
            story = ", ".join(str(k) for k in killed)
            raise ChaosError(f"{setting.name}, killed {story}, in {folder}: {error}") from error
        shutil.rmtree(folder)
        shutil.rmtree(store_of(folder), ignore_errors=True)
        killed = []
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="over all settings (default: at every change)")
    parser.add_argument("--compiled", type=int, default=6, help="of these, compiled (default 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of settings, such as plain,full")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    total = 0
    with _quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "write_report", write_short_report)
        names = options.only.split(",")
        chosen = [s for s in settings(place) if any(name in s.name for name in names)]
        compiled = [s for s in chosen if s.name == "compiled"]
        others = max(1, len(chosen) - len(compiled))
        share = None
        if options.kills is not None:
            share = -(-(options.kills - options.compiled * len(compiled)) // others)
        for number, setting in enumerate(chosen):
            kills = options.compiled if setting in compiled else share
            (room := place / f"setting{number}").mkdir()
            done = torment(setting, room, kills, dice)
            total += done.total()
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
            print(f"{setting.name}: {done.total()} kills ({kinds}), the same bits", flush=True)
    shutil.rmtree(place)
    print(f"{total} kills in all; every run ended with the bits of the run left alone")


if __name__ == "__main__":
    main()
