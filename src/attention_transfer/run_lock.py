"""One process writes to a run folder: a lock, which the system releases when the process ends."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from .errors import RunError, UserError

try:
    import fcntl
except ImportError:  # on Windows the folder is not locked
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class RunLock:
    """The lock on a folder, held during a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / LOCK_FILE
        self._stream: BinaryIO | None = None
        self._made_folders: list[Path] = []

    def __enter__(self) -> None:
        """Locks the folder, and creates it if it does not exist.

        Raises:
            UserError: if another process holds the lock; the message names it.
        """
        folders = (self.folder, *self.folder.parents)
        self._made_folders = [folder for folder in folders if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._stream is None:
            # Not truncated yet: it may hold the record of the lock's owner.
            stream = open(self.file, "a+b")
            if not _lock(stream):
                owner = _read_owner(stream)
                stream.close()
                raise UserError(
                    f"{self.folder} is being written by {owner}: wait for its end, or stop it"
                )
            # The previous owner may have removed the file after it was opened here.
            if _is_file_of(stream, self.file):
                self._stream = stream
            else:
                stream.close()
        _open_locks.add(self._stream)
        owner_record = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        try:
            self._stream.truncate(0)
            self._stream.write(json.dumps(owner_record).encode())
            self._stream.flush()
        except OSError:  # such as a full disk
            self._release()
            raise

    def check(self) -> None:
        """Raises `RunError` if the folder was removed or replaced since it was locked."""
        if self._stream is not None and not _is_file_of(self._stream, self.file):
            raise RunError(
                f"{self.folder} was removed or replaced while the run was writing to it: "
                "run the command again to start anew"
            )

    def __exit__(self, *error: object) -> None:
        self._release()

    def _release(self) -> None:
        """Removes the lock, and the folders that `__enter__` created if they are empty."""
        if self._stream is None:
            return
        # Before the lock is released: later, the file could be the next owner's.
        if _is_file_of(self._stream, self.file):
            self.file.unlink()
        _open_locks.discard(self._stream)
        self._stream.close()
        self._stream = None
        with suppress(OSError):
            for folder in self._made_folders:
                folder.rmdir()

    def remove_abandoned(self) -> None:
        """Removes the lock file unless a running process holds the lock."""
        # In a read-only folder the file stays.
        with suppress(OSError), open(self.file, "rb") as stream:
            if _lock(stream):
                self.file.unlink()


# A forked process shares the lock, and would keep it after the end of this process.
_open_locks: set[BinaryIO] = set()


def _close_in_child() -> None:
    for stream in _open_locks:
        stream.close()
    _open_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(stream: BinaryIO) -> bool:
    """Whether this process has the lock now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # The file system has no locks, as some network file systems.
        return True
    return True


def _is_file_of(stream: BinaryIO, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:
        return False


def _read_owner(stream: BinaryIO) -> str:
    stream.seek(0)
    try:
        owner = json.loads(stream.read())
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # the owner has not written its record yet
        return "another process"
