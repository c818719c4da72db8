"""What `Transfer` refuses in one line, and what becomes of its copies."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from toys import CLASSES, Net, assert_same, batch, count_hooks, gradients, make, make_all

import attention_transfer as at


class Returning(Net):
    """A network that returns what `wrap` makes of its logits."""

    def __init__(self, wrap: Callable[[Tensor], Any]):
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class ModelOutput(OrderedDict):
    """Like those of `transformers`."""


WRONG_OUTPUTS = {
    "of type tuple of 2": lambda logits: (logits, logits),
    "of type ModelOutput with logits, states": lambda z: ModelOutput(logits=z, states=None),
    "of type NoneType": lambda logits: None,
    r"torch.float32 \(4, 5, 1\)": lambda logits: logits[..., None],
    r"torch.int64 \(4, 5\)": lambda logits: logits.long(),
}


class TestOutputs:
    @pytest.mark.parametrize("words", WRONG_OUTPUTS)
    @pytest.mark.parametrize("method", [at.ActivationTransfer, at.GradientTransfer])
    def test_a_student_without_logits(self, words, method):
        student = Returning(WRONG_OUTPUTS[words])
        expected = f"the student returns .*{words}: expected logits.*wrap it"
        with pytest.raises(at.UserError, match=expected):
            make(method(), student=student)
        with pytest.raises(at.UserError, match=expected):
            at.Transfer(student)(*batch())

    @pytest.mark.parametrize("words", WRONG_OUTPUTS)
    @pytest.mark.parametrize("method", [at.KnowledgeDistillation, at.GradientTransfer])
    def test_a_teacher_without_logits(self, words, method):
        transfer = make(method(), teacher=Returning(WRONG_OUTPUTS[words]))
        with pytest.raises(at.UserError, match=f"the teacher returns .*{words}: expected logits"):
            transfer(*batch())

    def test_features_need_no_logits_of_the_teacher(self):
        plain = make(at.ActivationTransfer(), teacher=Net())(*batch()).loss
        for wrap in WRONG_OUTPUTS.values():
            wrapped = make(at.ActivationTransfer(), teacher=Returning(wrap))(*batch()).loss
            torch.testing.assert_close(wrapped, plain)

    def test_input_gradient(self):
        with pytest.raises(at.UserError, match="the model returns an object of type tuple"):
            at.input_gradient(Returning(lambda logits: (logits,)), *batch())


class TestLabels:
    @pytest.mark.parametrize("label", [-1, CLASSES, 255])
    @pytest.mark.parametrize("method", [at.KnowledgeDistillation, at.GradientTransfer])
    def test_out_of_range(self, label, method):
        x, y = batch()
        y[2] = label
        words = f"label {label} for logits of 5 classes: expected 0 to 4"
        with pytest.raises(at.UserError, match=words):
            make(method())(x, y)
        with pytest.raises(at.UserError, match=words):
            at.input_gradient(Net(), x, y)

    def test_of_no_class(self):
        x, y = batch()
        y[3] = -100
        out, fewer = make()(x, y), make()(x[:3], y[:3])
        torch.testing.assert_close(out.loss, fewer.loss)
        assert not [f for f in at.preflight(make().train(), x, y) if f.level == "error"]
        y[2] = -2
        with pytest.raises(at.UserError, match="label -2 "):
            make()(x, y)

    def test_transforms_of_torch_read_no_label(self):
        """A placeholder has no value."""
        x, y = batch()
        transfer = make()

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return transfer(x[None], y[None]).loss

        each = torch.func.vmap(loss)(x, y)
        torch.testing.assert_close(each.mean(), transfer(x, y).loss)

    @pytest.mark.parametrize("wrong", ["x", "y"])
    def test_no_tensor(self, wrong):
        given = dict(zip("xy", batch(), strict=True))
        given[wrong] = given[wrong].tolist()
        with pytest.raises(at.UserError, match=f"{wrong} is an object of type list: expected"):
            make()(**given)
        with pytest.raises(at.UserError, match=f"{wrong} is an object of type list: expected"):
            at.input_gradient(Net(), **given)
        with pytest.raises(at.UserError, match=f"{wrong} is an object of type list: expected"):
            at.preflight(make(), **given)

    def test_an_example_that_is_no_tensor(self):
        with pytest.raises(at.UserError, match="example is an object of type tuple: expected"):
            make(example=batch())


class TestProgress:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("decay", ["linear", "cosine", "step", "warm-up", "warm-up+linear"])
    def test_a_tensor_outside_is_clamped(self, decay, compiled):
        torch.compiler.reset()
        transfer = make(
            at.ActivationTransfer(decay=decay), at.KnowledgeDistillation(decay="linear")
        )
        if compiled:
            transfer.compile(backend="eager", fullgraph=True)
        for outside, nearest in ((1.5, 1.0), (-0.5, 0.0)):
            parts = transfer(*batch(), progress=torch.tensor(outside)).parts
            assert all(part >= 0 for part in parts.values())
            end = torch.tensor(nearest)
            assert_same(parts, transfer(*batch(), progress=end).parts)
            assert transfer.weights(torch.tensor(outside)) == transfer.weights(end)

    def test_a_tensor_with_axes(self):
        with pytest.raises(at.UserError, match=r"progress is a tensor \(1,\): expected a 0-d one"):
            make(at.ActivationTransfer(decay="linear"))(*batch(), progress=torch.tensor([0.5]))


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.three(self.two(self.one(self.one(x[:, :3]).mean(1, True) + x))))


class TestNamesOfNetworks:
    @pytest.mark.parametrize("example", [True, False])
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_layer_that_does_not_exist(self, side, example):
        pair = ["one", "one"]
        pair[side] = "onne"
        name = ("student", "teacher")[side]
        options = {} if example else {"example": None}
        with pytest.raises(at.UserError, match=f"^the {name}: Net has no layer 'onne'; did you"):
            make(at.ActivationTransfer(1000), pairs=[tuple(pair)], **options)

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_layer_that_cannot_be_tapped(self, side):
        with pytest.raises(at.UserError, match=f"^the {side}: layer 'one' is called more than"):
            make(at.ActivationTransfer(), pairs=[("one", "one")], **{side: Twice()})
        net = Net()
        net.idle = nn.Linear(2, 2)
        pair = tuple("idle" if name == side else "one" for name in ("student", "teacher"))
        with pytest.raises(at.UserError, match=f"^the {side}: layer 'idle' was not called"):
            make(at.ActivationTransfer(), pairs=[pair], **{side: net})

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_no_stages(self, side):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
        with pytest.raises(at.UserError, match=f"^the {side}: no stage in Sequential"):
            make(at.ActivationTransfer(), **{side: flat})


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
class TestCopies:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_of_a_transfer(self, copied, compiled):
        """A copy trains its own student towards its own teacher, and leaves the original alone."""
        torch.compiler.reset()
        transfer = make_all()
        if compiled:
            transfer.compile(backend="eager")
        expected = transfer(*batch())
        expected.loss.backward()
        other = copied(transfer)
        assert count_hooks(other) == count_hooks(transfer) == 3
        assert count_hooks(other.teacher) == count_hooks(transfer.teacher) == 3
        other.zero_grad()
        for parameter in transfer.parameters():
            parameter.data.zero_()
        out = other(*batch())
        out.loss.backward()
        assert_same(out.parts, expected.parts)
        assert_same(gradients(other), gradients(transfer), rtol=1e-3, atol=1e-3)
        student = other.student
        del other, out
        assert count_hooks(student) == 0

    def test_of_a_student_while_a_transfer_lives(self, copied):
        student = Net()
        transfer = make(at.ActivationTransfer(), student=student)
        x, y = batch()
        loss = transfer(x, y).loss
        other = copied(student)
        torch.testing.assert_close(other(x), student(x))
        compiled = torch.compile(other, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), student(x))
        torch.testing.assert_close(transfer(x, y).loss, loss)
        torch.testing.assert_close(make(at.ActivationTransfer(), student=other)(x, y).loss, loss)
        assert count_hooks(other) == 0

    def test_of_a_closed_one(self, copied):
        transfer = make_all()
        transfer.close()
        assert count_hooks(copied(transfer)) == 0


def test_an_average_of_a_transfer():
    transfer = make_all()
    average = AveragedModel(transfer)
    expected = transfer(*batch()).loss
    torch.testing.assert_close(average(*batch()).loss, expected)
    for parameter in transfer.parameters():
        parameter.data.mul_(2)
    average.update_parameters(transfer)
    assert average(*batch()).loss != expected


def test_a_saved_student_needs_no_package(tmp_path):
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, CLASSES))
    transfer = make(at.ActivationTransfer(), student=student, pairs=[("0", "one")])
    torch.save(student, tmp_path / "student.pt")
    script = (
        "import sys, torch\n"
        f"print(torch.load({str(tmp_path / 'student.pt')!r}, weights_only=False)"
        "(torch.ones(1, 3, 8, 8)).shape)\n"
        "assert 'attention_transfer' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "torch.Size([1, 5])\n", result.stderr
    assert transfer(*batch()).loss.isfinite()


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_share_a_transfer(compiled):
    """Each gets the loss of its own batch."""
    torch.compiler.reset()
    transfer = make_all()
    if compiled:
        transfer.compile(backend="eager")
    x, y = batch()
    batches = [k / 8 * x for k in range(1, 9)]
    expected = [transfer(x, y).parts for x in batches]
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda x: transfer(x, y).parts, batches))
        for parts, right in zip(results, expected, strict=True):
            assert_same(parts, right)
