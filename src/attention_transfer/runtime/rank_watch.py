"""Tells all ranks of a run within seconds that one has failed or died, even while they wait."""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.distributed import Store

from ..errors import RankError, RunError, UserError

LEAVE_SECONDS = 10.0  # time for a rank to end by itself when another has failed
# A machine that is off or unreachable sends nothing; its connection is closed after this time.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
ADDRESS_KEY = "watch"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended early: its error message and exit status, or that it died."""

    rank: int
    text: str
    status: int
    died: bool = False
    reported_here: bool = False  # this rank prints the failure, for the dead first rank of its node

    def __str__(self) -> str:
        if self.died:
            return self.text
        return f"rank {self.rank}: {self.text}"

    def as_error(self) -> BaseException:
        """The exception of a rank that ends because of this failure."""
        if self.reported_here:
            return RankError(str(self))
        if self.status == 2:
            return UserError(str(self))
        if self.status == 130:
            return KeyboardInterrupt(str(self))
        return RunError(str(self))


class RankWatch:
    """Connections of all ranks with rank 0. A thread listens on each.

    A rank that fails sends its `Failure`, which rank 0 forwards to the others. If a connection
    closes without a message, that rank died. A rank whose main thread does not end in time is
    killed.

    Args:
        store: where rank 0 writes its address.
        names: `process`, `host` and `local_rank` of each rank.
        seconds: how long to wait for a connection.
    """

    def __init__(self, store: Store, rank: int, names: list[dict[str, Any]], seconds: float):
        self.store = store  # kept open, because rank 0 may serve it
        self.rank, self.names = rank, names
        self.failure: Failure | None = None
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._left: set[int] = set()
        self.peers: dict[int, socket.socket] = {}
        if rank == 0:
            self.peers = _accept(store, len(names) - 1, seconds)
        else:
            self.peers = {0: _connect(store, rank, seconds)}
        for peer, connection in self.peers.items():
            _keep_alive(connection)
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()
        atexit.register(self._send, {"left": True})

    def tell(self, failure: Failure) -> None:
        """Sends the other ranks the reason why this one ends."""
        if self.failure is None:  # otherwise they have ended already
            self._send(asdict(failure))

    def wait_for_failure(self) -> Failure | None:
        """The failure of another rank, if one arrives within seconds; None otherwise."""
        self._failed.wait(LEAVE_SECONDS / 2)
        return self.failure

    def _listen(self, peer: int, connection: socket.socket) -> None:
        try:
            for line in connection.makefile("rb"):
                message = json.loads(line)
                if "left" in message:
                    self._left.add(peer)
                else:
                    self._fail(Failure(**message))
        except (OSError, ValueError):
            pass  # the connection broke
        if peer not in self._left:
            name = self.names[peer]
            text = (
                f"rank {peer} (process {name['process']} on {name['host']}) has died: every process"
                " stops; the last checkpoint is kept: run the same command again to continue"
            )
            self._fail(Failure(peer, text, 1, died=True))

    def _fail(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None:
                return
            if self.rank == 0:
                self._send(asdict(failure))
            if failure.died and self._is_lowest_alive_on_node(failure.rank):
                failure = replace(failure, reported_here=True)
            self.failure = failure
        self._failed.set()
        time.sleep(LEAVE_SECONDS)
        # The main thread is blocked, for example in a collective operation that cannot complete.
        error = failure.as_error()
        if failure.reported_here or self.names[self.rank]["local_rank"] == 0:
            print(f"attention-transfer: {error}", file=sys.stderr, flush=True)
        os._exit(failure.status)

    def _is_lowest_alive_on_node(self, dead: int) -> bool:
        """Whether this is the lowest rank of its node, except for `dead`."""
        host = self.names[self.rank]["host"]
        alive = [r for r, name in enumerate(self.names) if name["host"] == host and r != dead]
        return alive[0] == self.rank

    def _send(self, message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        for connection in self.peers.values():
            with suppress(OSError):  # that rank may have ended
                connection.sendall(line)


def _accept(store: Store, count: int, seconds: float) -> dict[int, socket.socket]:
    """Rank 0: the connections of the other ranks."""
    token = secrets.token_hex(16)  # rejects connections of other programs
    peers: dict[int, socket.socket] = {}
    with _serve() as server:
        server.settimeout(seconds)
        store.set(ADDRESS_KEY, json.dumps([server.getsockname()[1], token]))
        while len(peers) < count:
            connection, _ = server.accept()
            connection.settimeout(seconds)
            # At most 100 bytes: another program may send anything. Unbuffered, so that what follows
            # the line is left for `_listen`.
            line = connection.makefile("rb", buffering=0).readline(100)
            words = line.decode(errors="replace").split()
            connection.settimeout(None)  # `_listen` waits as long as the run lasts
            if len(words) == 2 and words[0] == token:
                peers[int(words[1])] = connection
            else:
                connection.close()
    return peers


def _serve() -> socket.socket:
    """A server on a free port, only for this machine if all ranks are on it."""
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(store: Store, rank: int, seconds: float) -> socket.socket:
    """Another rank: its connection to rank 0."""
    port, token = json.loads(store.get(ADDRESS_KEY))
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=seconds)
    connection.settimeout(None)
    connection.sendall(f"{token} {rank}\n".encode())
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
