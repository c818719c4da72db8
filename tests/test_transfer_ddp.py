"""Networks in DistributedDataParallel, and a Transfer trained in it, in one process.

`tests/methods/test_contract.py` has two processes.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import Net, assert_same, batch, count_hooks, make, make_all

import attention_transfer as at
from attention_transfer.taps import unwrap

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
LAYERS = ["one", "two", "three"]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPINGS = {
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled ddp": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
class TestWrappedNetworks:
    def test_tap(self, wrap):
        model, (x, _) = Net(), batch()
        wrapped = wrap(model)
        assert unwrap(wrapped) is model
        output, features = at.tap(wrapped, LAYERS, x)(x)
        assert list(features) == LAYERS
        torch.testing.assert_close(features["two"], model.two(model.one(x)))
        torch.testing.assert_close(output, model(x))
        gc.collect()
        assert count_hooks(model) == 0

    def test_stages_and_pairs(self, wrap):
        x = batch()[0]
        assert [s.name for s in at.stages(wrap(Net()), x)] == LAYERS
        assert at.pair_stages(wrap(Net()), wrap(Net(8)), x) == [(n, n) for n in LAYERS]

    def test_transfer(self, wrap):
        student, teacher = Net(), Net(8, seed=1)
        expected = make_all(student=student, teacher=teacher)(*batch())
        transfer = make_all(student=wrap(student), teacher=wrap(teacher))
        assert transfer.student is student and type(transfer.teacher) is Net
        assert not any(
            k.startswith(("student.module", "teacher", "_frozen")) for k in transfer.state_dict()
        )
        assert_same(transfer(*batch()).parts, expected.parts)


class TestWrappedTransfer:
    @pytest.mark.parametrize("name", ["at+kd", "all"])
    def test_a_step_is_that_of_the_transfer_itself(self, name):
        """A step of SGD with momentum on each, and the loss after it."""

        def create() -> at.Transfer:
            return (
                make_all()
                if name == "all"
                else make(at.ActivationTransfer(beta=10), at.KnowledgeDistillation())
            )

        plain, inner = create(), create()
        before = copy.deepcopy(plain.state_dict())
        teacher = copy.deepcopy(plain.teacher.state_dict())
        losses = []
        for call in (plain, DistributedDataParallel(inner)):
            optimizer = torch.optim.SGD(unwrap(call).trainable_parameters(), lr=0.01, momentum=0.9)
            call(*batch(), progress=0.3).loss.backward()
            optimizer.step()
            losses.append(call(*batch(), progress=0.3).loss.detach())
        assert_same(inner.state_dict(), plain.state_dict(), rtol=0, atol=0)
        assert any(not torch.equal(v, before[k]) for k, v in plain.state_dict().items())
        assert torch.equal(*losses)
        assert_same(inner.teacher.state_dict(), teacher, rtol=0, atol=0)

    def test_nothing_stays_hooked(self):
        student = Net()
        parallel = DistributedDataParallel(make_all(student=student))
        parallel(*batch()).loss.backward()
        assert count_hooks(student) == 3
        del parallel
        gc.collect()
        assert count_hooks(student) == 0

    def test_preflight_sees_through(self):
        found = at.preflight(
            DistributedDataParallel(make(at.ActivationTransfer(beta=10))), *batch()
        )
        assert [f.text for f in found if f.level == "error"] == []
