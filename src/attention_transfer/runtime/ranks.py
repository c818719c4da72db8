"""The processes of one run, started by a launcher or by this module.

Each process is a rank. The ranks meet before the data is opened and keep a connection to rank 0,
which tells all of them when one has failed or died. Without it, a collective operation would only
report a closed connection, or wait for half an hour.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from ..errors import RunError, UserError, first_line
from .options import RuntimeOptions
from .process import end_with_parent
from .rank_watch import Failure, RankWatch

MEET_SECONDS = 300.0  # how long a process waits for the others at the start
END_SECONDS = 30.0  # how long rank 0 waits at its end for the processes that it started
MOST_ON_CPU = 8  # processes allowed on a CPU with fewer cores, to try out a distributed run
PARENT_KEY = "ATTENTION_TRANSFER_PARENT"

_watch: RankWatch | None = None  # of this process, once it has met the others
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Launch:
    """The ranks and sizes that the launcher gave this process in environment variables."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None  # None if the launcher does not set it


def find_launch() -> Launch | None:
    """The launch variables of torchrun or SLURM; None without a launcher."""
    if "RANK" not in os.environ:
        _translate_slurm()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return None
    rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    on_this_node = os.environ.get("LOCAL_WORLD_SIZE")
    return Launch(rank, local_rank, world_size, int(on_this_node) if on_this_node else None)


def global_rank() -> int:
    """The rank of this process in the run."""
    launch = find_launch()
    if launch is None:
        return 0
    return launch.rank


def resolve_processes(options: RuntimeOptions) -> tuple[int, int]:
    """`devices` and `nodes` of the run: those of the launcher if there is one.

    Raises:
        UserError: if the options contradict the launcher, or this machine has fewer devices.
    """
    launch = find_launch()
    devices, nodes = options.devices, options.nodes
    if launch is None:
        _check_devices(options.device, devices, started=False)
        missing = [n for n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if n not in os.environ]
        if nodes > 1 and missing:
            raise UserError(
                f"--nodes {nodes}: the address of the other nodes is unknown "
                f"({', '.join(missing)} not set): start torchrun --nnodes {nodes} on each node"
            )
        return devices, nodes
    local = launch.local_world_size
    if local is None:
        local = devices if devices * nodes == launch.world_size else launch.world_size
    count, rest = divmod(launch.world_size, local)
    if rest:
        raise UserError(
            f"the launcher started {launch.world_size} processes, {local} on this node: "
            "start the same number on each node"
        )
    if (devices, nodes) not in ((1, 1), (local, count)):
        raise UserError(
            f"--devices {devices} --nodes {nodes}, but the launcher started {local} processes on "
            f"each of {count} nodes: leave both options out"
        )
    _check_devices(options.device, local, started=True)
    return local, count


def join(options: RuntimeOptions) -> None:
    """Starts the other processes of the run if no launcher did, and waits for all of them.

    Raises:
        UserError, RunError: if a process does not join in time.
    """
    global _watch
    # The runs of one command, such as those of --seeds, meet once.
    if options.devices * options.nodes == 1 or _watch is not None:
        return
    served = None
    if find_launch() is None:
        served = _start_children(options.devices, options.nodes)
    if parent := os.environ.get(PARENT_KEY):
        end_with_parent(int(parent))
    # `_start_children` has set the variables that a launcher sets.
    launch = find_launch()
    assert launch is not None
    try:
        # A restart by torchrun uses the same store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"attention-transfer/{attempt}"
        store = dist.PrefixStore(prefix, served or _open_store(launch))
        names = _meet(store, launch)
        _watch = RankWatch(store, launch.rank, names, MEET_SECONDS)
    except RunError:
        raise
    except (RuntimeError, OSError) as error:
        raise RunError(f"the processes did not meet: {first_line(error)}") from error


@contextmanager
def propagate_failures() -> Iterator[None]:
    """A failure of the block ends the other ranks, and the failure of another rank ends the block.

    Raises:
        RunError, UserError, KeyboardInterrupt: as the other rank did; `RankError` if another rank
            died and this one reports it.
    """
    try:
        yield
    except (UserError, RunError) as error:
        _tell(str(error), 2 if isinstance(error, UserError) else 1)
        raise
    except Exception as error:
        # A collective operation fails when another rank has ended; the watch knows which one.
        if _watch is not None and (failure := _watch.wait_for_failure()) is not None:
            raise failure.as_error() from error
        text = f"{type(error).__name__}: {first_line(error)}"
        _tell(text, 1)
        if global_rank() == 0 or _watch is None or os.environ.get("ATTENTION_TRANSFER_TRACEBACK"):
            raise
        raise RunError(text) from error  # rank 0 prints it
    except KeyboardInterrupt as stop:
        if type(stop) is KeyboardInterrupt:  # a subclass: all ranks agreed to stop
            _tell("interrupted", 130)
        raise


def highest(value: int) -> int:
    """The highest value of all ranks; all of them must call this."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([int(value)])
    dist.all_reduce(box, dist.ReduceOp.MAX, _host_group())
    return int(box)


def gather(value: Any) -> list[Any]:
    """The value of each rank; all of them must call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, _host_group())
    return values


@cache
def _host_group() -> Any:
    """A group on the CPU: a GPU would have to finish its work before it can answer."""
    if dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


def _tell(text: str, status: int) -> None:
    if _watch is not None:
        _watch.tell(Failure(global_rank(), text, status))


def _translate_slurm() -> None:
    """Sets torchrun's variables from those of srun."""
    if "SLURM_PROCID" not in os.environ:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect() or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return
    try:
        slurm = SLURMEnvironment()
    except RuntimeError as error:
        raise UserError(f"SLURM: {first_line(error)}") from error
    tasks = int(os.environ["SLURM_NTASKS"])
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    os.environ |= {
        "RANK": str(slurm.global_rank()),
        "LOCAL_RANK": str(slurm.local_rank()),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def _check_devices(device: str, count: int, started: bool) -> None:
    """Raises `UserError` if this machine does not have `count` devices.

    `started`: whether a launcher has started the processes; those on the CPU are then not checked.
    """
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and count > torch.cuda.device_count():
        raise UserError(
            f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs, "
            "and each process needs one"
        )
    most = max(MOST_ON_CPU, os.cpu_count() or 1)
    if not on_gpu and not started and count > most:
        raise UserError(
            f"--devices {count}: this machine has {os.cpu_count()} cores, "
            f"expected at most {most} processes"
        )


def _start_children(devices: int, nodes: int) -> dist.TCPStore | None:
    """Starts the other processes of this node; returns the store if all are on this node."""
    node = int(os.environ.get("NODE_RANK", "0"))
    store = None
    if nodes == 1:
        store = _serve("127.0.0.1", 0)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= {"WORLD_SIZE": str(devices * nodes), "LOCAL_WORLD_SIZE": str(devices)}
    main = sys.modules["__main__"]
    program = [os.path.abspath(sys.argv[0])]
    if main.__spec__ is not None:
        # Started by `python -m`: the file alone could not import its package.
        program = ["-m", main.__spec__.name]
    for local_rank in range(1, devices):
        ranks = {"RANK": str(node * devices + local_rank), "LOCAL_RANK": str(local_rank)}
        environment = os.environ | ranks | {PARENT_KEY: str(os.getpid())}
        command = [sys.executable, *program, *sys.argv[1:]]
        _children.append(subprocess.Popen(command, env=environment))
    atexit.register(_wait_for_children)
    os.environ |= {"RANK": str(node * devices), "LOCAL_RANK": "0"}
    return store


def _wait_for_children() -> None:
    """Waits for the processes that this one started; they end with it."""
    for child in _children:
        if _watch is None:  # without a connection they do not learn that this process ends
            child.kill()
        try:
            child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()


def _serve(host: str, port: int) -> dist.TCPStore:
    # `multi_tenant`, because the process group opens a store at the same address.
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)


def _open_store(launch: Launch) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 serves unless torchrun's agent does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _serve(host, port)
    timeout = timedelta(seconds=MEET_SECONDS)
    try:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except dist.DistError as error:
        raise RunError(
            f"rank {launch.rank} of {launch.world_size} waited {MEET_SECONDS:.0f} s for rank 0 at "
            f"{host}:{port}: start rank 0, or check that this machine can reach it"
        ) from error


def _meet(store: dist.Store, launch: Launch) -> list[dict[str, Any]]:
    """Waits for all ranks; returns host, process and local rank of each."""
    name = {"process": os.getpid(), "host": socket.gethostname(), "local_rank": launch.local_rank}
    store.set(str(launch.rank), json.dumps(name))
    missing = list(range(launch.world_size))
    end = time.monotonic() + MEET_SECONDS
    while missing:
        for local_rank, child in enumerate(_children, 1):
            if child.poll():
                raise RunError(
                    f"process {local_rank} of this node ended with status {child.returncode} "
                    "before the training began"
                )
        if time.monotonic() > end:
            ranks = ", ".join(str(rank) for rank in missing[:8])
            raise RunError(
                f"rank {launch.rank} of {launch.world_size} waited {MEET_SECONDS:.0f} s for rank "
                f"{ranks}: start as many processes as --devices and --nodes ask for"
            )
        missing = [rank for rank in missing if not store.check([str(rank)])]
        if missing:
            time.sleep(0.05)
    return [json.loads(store.get(str(rank))) for rank in range(launch.world_size)]
