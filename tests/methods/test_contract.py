"""What a method owes, whichever it is: a new one is checked by being registered."""

from __future__ import annotations

import copy
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import CLASSES, Net, assert_same, batch, gradients, make, make_all

import attention_transfer as at
from attention_transfer.methods.registry import METHODS


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_registration(self, name):
        method = METHODS[name]()
        assert method.name == METHODS[name].name == name
        assert METHODS[name].__doc__

    def test_scalar_and_gradient(self, name):
        method, x, y = METHODS[name](), *batch()
        transfer = make(method)
        out = transfer(x, y)
        part = out.parts[method.name]
        assert (
            part.shape == () and part.dtype == torch.float32 and part.isfinite() and part.item() > 0
        )
        part.backward()
        found = gradients(transfer.student)
        assert found["one.0.weight"].abs().sum() > 0 and all(
            g.isfinite().all() for g in found.values()
        )
        if METHODS[name].needs_teacher:
            assert all(p.grad is None for p in transfer.teacher.parameters())
        torch.testing.assert_close(sum(out.parts.values()), out.loss)

    def test_zero_on_identity(self, name):
        if not METHODS[name].needs_teacher:
            pytest.skip("compares with no teacher")
        method, net = METHODS[name](), Net()
        transfer = make(method, student=net, teacher=copy.deepcopy(net))
        part = transfer(*batch()).parts[method.name]
        part.backward()
        assert part.item() == pytest.approx(0, abs=1e-6)
        assert all(g.abs().max() < 1e-5 for g in gradients(net).values())

    def test_descending_lowers_it(self, name):
        method = METHODS[name]()
        transfer, (x, y) = make(method), batch()
        part = transfer(x, y).parts[method.name]
        part.backward()
        norm = sum(g.square().sum() for g in gradients(transfer.student).values())
        with torch.no_grad():
            for p in transfer.student.parameters():
                p -= 1e-3 * part.detach() / norm * (0 if p.grad is None else p.grad)
        assert transfer(x, y).parts[method.name] < part

    def test_weights_are_named_and_linear(self, name):
        method = METHODS[name]()
        found = method.weights(0.0)
        assert all(isinstance(v, float) for v in found.values()) and set(found) <= {"alpha", "beta"}
        assert 0 <= method.cross_entropy_share(0.0) <= 1

    def test_equal_halves_average_to_the_whole(self, name):
        transfer, (x, y) = make(METHODS[name]()), batch(8)
        part = transfer.methods[0].name
        halves = [transfer(x[i::2], y[i::2]).parts[part] for i in (0, 1)]
        torch.testing.assert_close(sum(halves) / 2, transfer(x, y).parts[part])

    def test_bfloat16(self, name):
        method = METHODS[name]()
        transfer, (x, y) = make(method), batch()
        exact = transfer(x, y).parts[method.name]
        with torch.autocast("cpu", torch.bfloat16):
            out = transfer(x, y)
        out.loss.backward()
        assert out.loss.dtype == torch.float32 and all(
            p.dtype == torch.float32 for p in out.parts.values()
        )
        assert all(g.isfinite().all() for g in gradients(transfer).values())
        torch.testing.assert_close(out.parts[method.name], exact, rtol=0.1, atol=1e-2)

    def test_compiled(self, name):
        torch.compiler.reset()
        transfer, (x, y) = make(METHODS[name]()), batch()
        eager = transfer(x, y, torch.tensor(0.5))
        eager.loss.backward()
        expected = gradients(transfer)
        transfer.zero_grad()
        transfer.compile(backend="aot_eager", fullgraph=True)
        out = transfer(x, y, torch.tensor(0.5))
        out.loss.backward()
        assert_same(out.parts, eager.parts)
        torch.testing.assert_close(out.logits, eager.logits)
        assert_same(gradients(transfer), expected, rtol=1e-4, atol=1e-5)


def test_inductor_equals_eager():
    """Progress is data, so a schedule never recompiles."""
    torch.compiler.reset()
    x, y = batch()
    transfer = make(
        at.ActivationTransfer(decay="cosine"), at.KnowledgeDistillation(), pairs=[("two", "two")]
    )
    points = [torch.tensor(p) for p in (0.0, 0.3, 0.9)]
    eager = [transfer(x, y, p) for p in points]
    eager[0].loss.backward()
    expected = gradients(transfer)
    transfer.zero_grad()
    transfer.compile(fullgraph=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for progress, before in zip(points, eager, strict=True):
        out = transfer(x, y, progress)
        assert_same(out.parts, before.parts, rtol=1e-4, atol=1e-4)
        if progress == 0:
            out.loss.backward()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 2
    )  # teacher and student
    assert_same(gradients(transfer), expected, rtol=1e-4, atol=1e-4)


def test_torch_compile_of_the_whole():
    torch.compiler.reset()
    x, y = batch()
    transfer = make_all()
    expected = transfer(x, y)
    compiled = torch.compile(transfer, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x, y).parts, expected.parts)


STUDENTS = {"free": lambda: Net(), "normalised": lambda: at.create_model("wrn-10-1", CLASSES)}
CASES = [(name, student) for student in STUDENTS for name in METHODS]


def make_parallel(name: str, student: str, rank: int = 0) -> at.Transfer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = STUDENTS[student]()
    transfer = make(METHODS[name](), student=net).double()
    for p in transfer.parameters():
        p.data += rank  # rank 0's weights are everybody's, the adapters' too
    return transfer


def measured(
    transfer: at.Transfer, call: nn.Module, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], ...]:
    out = call(x, y)
    out.loss.backward()
    return {"loss": out.loss.detach(), **{n: p.detach() for n, p in out.parts.items()}}, gradients(
        transfer
    )


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    options = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    x, y = batch(8, dtype=torch.float64)
    found = {}
    for case in CASES:
        transfer = make_parallel(*case, rank=rank)
        parallel = nn.parallel.DistributedDataParallel(transfer)
        found[case] = measured(transfer, parallel, x[rank::2], y[rank::2])
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def averaged(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    assert a.keys() == b.keys()
    return {name: (value + b[name]) / 2 for name, value in a.items()}


@pytest.mark.filterwarnings("ignore:.*the student uses statistics of the batch")
def test_one_process_against_two(tmp_path):
    """The mean over the ranks is that of the global batch, for the parts and the gradients.

    Batch normalisation takes statistics over each rank's half: then it is the mean of the halves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    x, y = batch(8, dtype=torch.float64)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case in CASES:
        parts, reached = (averaged(*pair) for pair in zip(*(r[case] for r in ranks), strict=True))
        if case[-1] == "free":
            alone = make_parallel(*case)
            expected = measured(alone, alone, x, y)
        else:
            halves = []
            for rank in (0, 1):
                alone = make_parallel(*case)
                halves.append(measured(alone, alone, x[rank::2], y[rank::2]))
            expected = tuple(averaged(*pair) for pair in zip(*halves, strict=True))
        assert_same(parts, expected[0], rtol=1e-10, atol=1e-12)
        assert_same(reached, expected[1], rtol=1e-10, atol=1e-12)
        for rank in ranks:  # every rank has the same gradients
            assert_same(rank[case][1], reached, rtol=0, atol=0)
