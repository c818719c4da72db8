"""Every function refuses in one line what is no argument of it, and names the argument."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from toys import CLASSES, Net, batch, draw, make

import attention_transfer as at
from attention_transfer.maps import row_norm
from attention_transfer.methods.base import StepInputs

MODEL = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)).double()
X, Y = draw(2, 3, 4, 4), torch.tensor([1, 2])
LOGITS = draw(2, CLASSES)
J = draw(2, 3, 4, 4)

# {argument: a call with it, the others being right}
TENSORS = {
    "features": lambda wrong: at.attention_map(wrong),
    "student features of pair 0": lambda wrong: at.at_loss([wrong], [X]),
    "teacher features of pair 0": lambda wrong: at.at_loss([X], [wrong]),
    "student_logits": lambda wrong: at.kd_loss(wrong, LOGITS),
    "teacher_logits": lambda wrong: at.kd_loss(LOGITS, wrong),
    "student features": lambda wrong: at.full_activation_loss(wrong, X),
    "teacher features": lambda wrong: at.full_activation_loss(X, wrong),
    "j_student": lambda wrong: at.gradient_loss(wrong, J),
    "j_teacher": lambda wrong: at.gradient_loss(J, wrong),
    "x": lambda wrong: at.input_gradient(MODEL, wrong, Y),
    "y": lambda wrong: at.input_gradient(MODEL, X, wrong),
    "x of symmetry": lambda wrong: at.symmetry_loss(MODEL, wrong, Y),
    "x of min-l2": lambda wrong: at.gradient_norm_loss(MODEL, wrong, Y),
    "x of Transfer": lambda wrong: at.Transfer(MODEL)(wrong, Y),
    "y of Transfer": lambda wrong: at.Transfer(MODEL)(X, wrong),
    "example": lambda wrong: at.Transfer(MODEL, example=wrong),
    "example of stages": lambda wrong: at.stages(MODEL, wrong),
    "example of tap": lambda wrong: at.tap(MODEL, ["0"], wrong),
}
NO_TENSORS = {
    "None": None,
    "lambda": lambda x: x,
    "list": [1.0, 2.0],
    "sparse": X.to_sparse(),
    "meta": X.to("meta"),
    "nested": torch.nested.nested_tensor([X[0], X[1]]),
}


@pytest.mark.parametrize("wrong", NO_TENSORS)
@pytest.mark.parametrize("argument", TENSORS)
def test_what_is_no_dense_tensor(argument, wrong):
    if argument.startswith("example") and wrong == "None":
        pytest.skip("an example may be missing")
    name = argument.split(" of ")[0] if argument.count("pair") == 0 else argument
    with pytest.raises(at.UserError, match=f"^{name}\\b.*expected") as refused:
        TENSORS[argument](NO_TENSORS[wrong])
    assert "\n" not in str(refused.value)


NEED_FLOATS = [name for name in TENSORS if name.split()[0] not in ("y", "example", "x")]


@pytest.mark.parametrize("argument", NEED_FLOATS)
@pytest.mark.parametrize("wrong", ["int", "bool", "complex", "empty"])
def test_what_holds_no_floats(argument, wrong):
    right = LOGITS if "logits" in argument else X
    values = {
        "int": right.int(),
        "bool": right > 0,
        "complex": right * 1j,
        "empty": right[:0],
    }
    with pytest.raises(at.UserError, match=f"^{argument}.*expected|^{argument}.*empty"):
        TENSORS[argument](values[wrong])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", NEED_FLOATS)
def test_values_that_are_not_finite(argument, value):
    right = (LOGITS if "logits" in argument else X).clone()
    right[1, 2] = value
    words = rf"^{argument}: \d+ of \d+ values are NaN or infinite: expected finite ones"
    with pytest.raises(at.UserError, match=words):
        TENSORS[argument](right)


@pytest.mark.parametrize(
    "loss", [at.input_gradient, at.gradient_norm_loss, at.symmetry_loss], ids=lambda f: f.__name__
)
def test_input_gradients_that_are_not_finite(loss):
    with pytest.raises(at.UserError, match=r"^x: (96 of 96|192 of 192) values are NaN or infinite"):
        loss(MODEL, X * math.nan, Y)
    overflowing = copy.deepcopy(MODEL)
    overflowing[1].weight.data.fill_(math.inf)
    with pytest.raises(at.UserError, match="gradients of the model are not finite"):
        loss(overflowing, X, Y)


def test_a_norm_of_nan_is_nan():
    """Not 0, which would hide a diverged student."""
    wrong = X * math.nan
    for loss in (row_norm(wrong.flatten(1)), row_norm(wrong.flatten(1), 3.0)):
        assert loss.isnan().all()
    step = StepInputs(Y, student_gradient=wrong, teacher_gradient=X)
    assert at.GradientTransfer(squared=False)(step).isnan()


def test_overflow():
    large = torch.full((1, 2, 4, 4), 1e6)
    with pytest.raises(at.UserError, match=r"features: \|A\|\^p overflows at p = 64: .*smaller"):
        at.attention_map(large, p=64)
    with pytest.raises(at.UserError, match=r"features: \|A\|\^p overflows at p = 64: .*smaller"):
        at.at_loss(large, large, p=64)
    with pytest.raises(at.UserError, match=r"temperature is 1e-40"):
        at.kd_loss(LOGITS.float(), LOGITS.float(), 1e-40)
    with pytest.raises(at.UserError, match="the norm of the input gradients overflows"):
        at.gradient_loss(1e30 * J.float(), J.float())
    assert at.attention_map(large.double(), p=40).isfinite().all()


def test_compiled_code_reads_no_values():
    """A graph must not wait for values, and stays whole."""
    torch.compiler.reset()

    def losses(x, logits):
        return (
            at.at_loss(x, x + 1, weights=[0.5]),
            at.kd_loss(logits, logits + 1),
            at.gradient_loss(x, x + 1),
            at.full_activation_loss(x, x + 1),
            at.attention_map(x),
        )

    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    for result in compiled(X * math.nan, LOGITS * math.nan):
        assert result.isnan().all()
    for result, expected in zip(compiled(X, LOGITS), losses(X, LOGITS), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("method", [at.ActivationTransfer, at.KnowledgeDistillation])
def test_a_loss_in_training_may_be_not_finite(method):
    """A loss scaler skips such a step, and the trainer names its part."""
    x, y = batch()
    assert not make(method())(x * math.nan, y).loss.isfinite()


MODULES = {
    "model": lambda wrong: at.input_gradient(wrong, X, Y),
    "model of symmetry": lambda wrong: at.symmetry_loss(wrong, X, Y),
    "model of min-l2": lambda wrong: at.gradient_norm_loss(wrong, X, Y),
    "model of tap": lambda wrong: at.tap(wrong, ["0"]),
    "model of stages": lambda wrong: at.stages(wrong, X),
    "the student: model": lambda wrong: at.pair_stages(wrong, MODEL, X),
    "student": lambda wrong: at.Transfer(wrong),
    "teacher": lambda wrong: at.Transfer(MODEL, wrong, [at.KnowledgeDistillation()]),
    "transfer": lambda wrong: at.preflight(wrong, X, Y),
}


@pytest.mark.parametrize("wrong", [None, lambda x: x, "wrn-16-1", X, nn.Linear])
@pytest.mark.parametrize("argument", MODULES)
def test_what_is_no_module(argument, wrong):
    if argument == "teacher" and wrong is None:
        pytest.skip("a teacher may be missing")
    words = f"^{argument.split(' of ')[0]} is .*: expected a (torch.nn.Module|module|Transfer)"
    with pytest.raises(at.UserError, match=words):
        MODULES[argument](wrong)


KD, AT = at.KnowledgeDistillation, at.ActivationTransfer
OPTIONS = {
    "weights": lambda v: at.at_loss(X, X + 1, weights=v),
    "weights of a dict": lambda v: at.at_loss({"a": X}, {"a": X}, weights={"a": v}),
    "weights in a list": lambda v: at.at_loss([X], [X], weights=[v]),
    "weights of the method": lambda v: AT(weights=v),
    "temperature": lambda v: at.kd_loss(LOGITS, LOGITS, v),
    "normalize": lambda v: at.attention_map(X, normalize=v),
    "squared": lambda v: at.gradient_loss(J, J, v),
    "squared of symmetry": lambda v: at.symmetry_loss(MODEL, X, Y, v),
    "squared of the method": lambda v: at.GradientTransfer(squared=v),
    "create_graph": lambda v: at.input_gradient(MODEL, X, Y, v),
    "beta": lambda v: at.convert_beta(v, "authors", "caffe", 4),
    "positions": lambda v: at.convert_beta(1.0, "authors", "caffe", v),
    "unknown source convention": lambda v: at.convert_beta(1.0, v, "caffe", 4),
    "unknown decay": lambda v: KD(decay=v),
    "layers": lambda v: at.tap(MODEL, [v]),
    "pairs": lambda v: at.Transfer(MODEL, MODEL, [AT(1)], [("1", v)]),
    "pairs themselves": lambda v: at.Transfer(MODEL, MODEL, [AT(1)], v),
    "methods": lambda v: at.Transfer(MODEL, MODEL, v),
    "methods in a list": lambda v: at.Transfer(MODEL, MODEL, [v]),
    "label_smoothing": lambda v: at.Transfer(MODEL, label_smoothing=v),
    "example": lambda v: at.pair_stages(MODEL, MODEL, (v,)),
    "progress": lambda v: at.Transfer(MODEL, MODEL, [KD()])(X, Y, v),
    "name": lambda v: at.create_model(v, 5),
    "num_classes": lambda v: at.create_model("wrn-10-1", v),
    "folder": lambda v: at.load_authors_run(v),
    "run_folder": lambda v: at.load_student(v),
}


@pytest.mark.parametrize(
    "wrong", [lambda x: x, X, -1.5, math.nan, {}, b"sum"], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options(option, wrong):
    name = re.sub(r" (of|in|themselves).*", "", option)
    with pytest.raises(at.UserError, match=rf"^{name}\b.*expected") as refused:
        OPTIONS[option](wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("labels", [[-100, -100], [[0.5, -0.5]] * 2, [[math.nan] * 2] * 2])
def test_labels_without_a_meaning(labels):
    with pytest.raises(at.UserError, match=r"labels .*expected"):
        at.Transfer(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double())(X, torch.tensor(labels))


def test_an_empty_batch():
    with pytest.raises(at.UserError, match=r"^x has the shape \(0, 3, 4, 4\): expected images"):
        at.Transfer(MODEL)(X[:0], Y[:0])
    with pytest.raises(at.UserError, match=r"^input gradients of images \(0, 3, 4, 4\)"):
        at.input_gradient(MODEL, X[:0], Y[:0])


def test_progress_is_checked_without_a_schedule():
    with pytest.raises(at.UserError, match=r"progress is 1.5: expected .* in \[0, 1\]"):
        make(at.ActivationTransfer())(*batch(), progress=1.5)


@pytest.mark.parametrize("kind", [at.FullActivationTransfer, at.ActivationTransfer])
def test_one_method_in_two_transfers(kind):
    """The second would replace the adapters, or the weights of the pairs, of the first."""
    x, y = batch()
    method = kind()
    first = make(method, teacher=Net(8))
    expected = first(x, y).loss
    second = make(method, teacher=Net(8), pairs=[("one", "one")])
    assert second.methods[0] is not method and first.methods[0] is method
    second(x, y).loss.backward()
    torch.testing.assert_close(first(x, y).loss, expected)


def test_a_method_without_state_serves_several_transfers():
    shared = at.KnowledgeDistillation()
    torch.testing.assert_close(make(shared)(*batch()).loss, make(shared)(*batch()).loss)


def double(x):
    return 2 * x


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_copies_keep_the_transforms(role):
    """`deepcopy` takes lambdas, too; pickle takes functions that a module defines by name."""
    transfer = make(KD(), **{f"{role}_transform": lambda x: 2 * x})
    named = make(KD(), **{f"{role}_transform": double})
    expected = named(*batch()).loss
    for other in (copy.deepcopy(transfer), pickle.loads(pickle.dumps(named))):
        torch.testing.assert_close(other(*batch()).loss, expected)
