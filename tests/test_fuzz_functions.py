"""Any argument to any public function: the value of METHOD.md's formula, or one line that refuses.

ATTENTION_TRANSFER_FUZZ sets the number of calls of each test; without it they are few and the same
each time.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import reference
from torch import Tensor, nn
from toys import CLASSES, Net, make

import attention_transfer as at
from attention_transfer.map_options import LossOptions
from attention_transfer.methods.registry import METHODS
from attention_transfer.options import option_specs

COUNT = int(os.environ.get("ATTENTION_TRANSFER_FUZZ", "0"))
fuzz = settings(
    max_examples=COUNT or 25,
    derandomize=not COUNT,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = {torch.float64: 1e307}  # others are taken in float32
FAULTS = ("nan", "inf", "int", "complex", "bool", "meta", "sparse", "nested", "no tensor")
# Hypothesis also tries words of the source, such as `caffe`.
CHOICES = {choice for spec in option_specs(LossOptions).values() for choice in spec.choices}
JUNK = st.one_of(
    st.none(),
    st.text(string.printable, max_size=5).filter(lambda text: text not in CHOICES),
    st.floats(max_value=-1e-9),
    st.sampled_from([math.nan, len, {}, [], [1.0], object(), torch.ones(2), b"sum", (1, 2)]),
)


class Refusal(str):
    """The one line of a `UserError`."""


def outcome(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the call returns, or its refusal, which must name an argument in one line."""
    try:
        return function(*args, **options)
    except at.UserError as error:
        text = str(error)
    assert "\n" not in text and len(text) < 600
    names = inspect.signature(function).parameters
    words = [
        "label",
        "images",
        "model",
        "run",
        *(word for name in names for word in (name, *name.split("_"))),
    ]
    assert any(re.search(rf"(?<![a-z]){word}(?![a-z]{2})", text) for word in words), text
    return Refusal(text)


def refused(result: Any) -> bool:
    return isinstance(result, Refusal)


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], faults: float = 0.2, scale: int = 30) -> Any:
    """A tensor of this shape in any dtype, size of numbers and memory order; sometimes no good."""
    seed = draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    exponent = draw(st.sampled_from([0, 0, 0, draw(st.integers(-scale, scale))]))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    values = values * draw(st.sampled_from([1, 1, 1, 0]))  # a dead layer
    values = values.to(draw(st.sampled_from(FLOATS)))
    if draw(st.booleans()) and values.ndim > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    if draw(st.floats(0, 1)) < faults:
        return spoil(values, draw(st.sampled_from(FAULTS)))
    return values


def spoil(values: Tensor, fault: str) -> Any:
    if fault in ("nan", "inf") and values.numel():
        values = values.clone()
        values.flatten()[-1:].fill_(float(fault)) if values.is_contiguous() else values.fill_(
            float(fault)
        )
        return values
    if fault == "nested" and values.ndim > 1 and len(values):
        return torch.nested.nested_tensor(list(values))
    changes: dict[str, Callable[[], Any]] = {
        "int": values.nan_to_num(0, 9, -9).clamp(-9, 9).int,
        "complex": lambda: values.float() * 1j,
        "bool": lambda: values > 0,
        "meta": lambda: values.to("meta"),
        "sparse": lambda: values.float().to_sparse(),
    }
    return changes.get(fault, values.tolist)()


def good(value: Any) -> bool:
    """Whether a tensor has values that a loss can be taken of."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return False
    if value.is_meta or not value.is_floating_point() or 0 in value.shape:
        return False
    return bool(value.isfinite().all())


def array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def close(result: Tensor, expected: Any, *inputs: Tensor, slack: float = 1.0) -> None:
    double = all(value.dtype == torch.float64 for value in inputs)
    assert result.dtype == (
        torch.float64 if any(i.dtype == torch.float64 for i in inputs) else torch.float32
    )
    tolerance = slack * (1e-8 if double else 2e-4)
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def finite_gradient(loss: Tensor, of: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss.sum(), of)
    assert not gradient.isnan().any()
    # The norm is at least 1e-12, so the gradient of tiny values may be beyond the largest float16.
    assert of.dtype == torch.float16 or gradient.isfinite().all()


sizes = st.integers(0, 5) | st.integers(1, 5)
feature_shapes = st.one_of(
    st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 6)] * 2),
    st.tuples(st.integers(1, 4), st.sampled_from([1, 4, 9, 6]), st.integers(1, 5)),
    st.lists(sizes, max_size=5).map(tuple),
)
map_options = {
    "kind": st.sampled_from(["sum", "max"]),
    "p": st.sampled_from([1, 2, 3, 4, 1.5, 2.5, 8.0, 64]),
    "axis": st.sampled_from(["space", "channel"]),
}
loss_options = {
    **map_options,
    "convention": st.sampled_from(["authors", "paper", "caffe"]),
    "resize": st.sampled_from(["map", "features", "bilinear"]),
    "norm": st.sampled_from([1, 2, 3.5, math.inf]),
}


@st.composite
def choose(draw: Any, options: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Some of the options, and the one among them that is junk, if one is."""
    names = draw(st.lists(st.sampled_from(sorted(options)), unique=True))
    chosen = {name: draw(options[name]) for name in names}
    wrong = draw(st.sampled_from([None, None, None, *names]))
    if wrong is not None:
        chosen[wrong] = draw(JUNK)
    return chosen, wrong


def as_maps(features: Tensor) -> np.ndarray:
    """(N, C, H, W) of the reference, of tokens as well."""
    values = array(features)
    if values.ndim == 4:
        return values
    n, length, width = values.shape
    side = math.isqrt(length)
    grid = (side, side) if side * side == length else (1, length)
    return values.transpose(0, 2, 1).reshape(n, width, *grid)


def overflows(features: Tensor, kind: str = "sum", p: float = 2.0, axis: str = "space") -> bool:
    """Whether Q may be beyond the largest number."""
    with np.errstate(over="ignore"):
        q = reference.attention(as_maps(features), kind, p, axis)[0]
    return bool(q.max() > LARGEST.get(features.dtype, 1e37))


@fuzz
@given(st.data())
def test_attention_map(data):
    features = data.draw(feature_shapes.flatmap(tensors))
    options, wrong = data.draw(choose({**map_options, "normalize": st.booleans()}))
    result = outcome(at.attention_map, features, **options)
    if wrong or not good(features) or features.ndim not in (3, 4):
        assert refused(result)
        return
    normalize = options.pop("normalize", True)
    if overflows(features, **options):
        return
    with np.errstate(under="ignore"):
        q, y = reference.attention(as_maps(features), **options)
    if normalize:
        close(result, y, features)
        finite_gradient(at.attention_map(features.requires_grad_(), **options), features)
    else:
        scale = max(1.0, float(q.max()))
        close(result / scale, q / scale, features, slack=options.get("p", 2.0))


def one_each(weights: Any, count: int) -> bool:
    """Whether junk happens to be weights of `count` pairs."""
    return isinstance(weights, list | tuple) and len(weights) == count


@fuzz
@given(st.data())
def test_at_loss(data):
    count = data.draw(st.integers(1, 2))
    student, teacher = [], []
    for _ in range(count):
        shape = data.draw(feature_shapes)
        student.append(data.draw(tensors(shape, 0.1)))
        if len(shape) == 4 and data.draw(st.booleans()):
            shape = (shape[0], *data.draw(st.tuples(*[st.integers(1, 6)] * 3)))
        teacher.append(data.draw(tensors(shape, 0.1)))
    options, wrong = data.draw(choose(loss_options))
    weights = data.draw(st.none() | st.lists(st.floats(0, 10), min_size=count, max_size=count))
    if data.draw(st.integers(0, 9)) == 0:
        weights = data.draw(JUNK.filter(lambda w: w is not None and not one_each(w, count)))
        wrong = "weights"
    names = [f"layer {j}" for j in range(count)]
    if weights is not None and wrong != "weights" and data.draw(st.booleans()):
        result = outcome(
            at.at_loss,
            dict(zip(names, student, strict=True)),
            dict(zip(names, teacher, strict=True)),
            weights=dict(zip(names, weights, strict=True)),
            **options,
        )
    else:
        result = outcome(at.at_loss, student, teacher, weights=weights, **options)
    features = [*student, *teacher]
    if wrong or not all(good(f) and f.ndim in (3, 4) for f in features):
        assert refused(result)
        return
    mapping = {key: options[key] for key in map_options if key in options}
    if any(overflows(f, **mapping) for f in features):
        return
    if options.get("axis") == "channel" and any(
        as_maps(s).shape[1] != as_maps(t).shape[1] for s, t in zip(student, teacher, strict=True)
    ):
        assert refused(result)
        return
    expected = 0.0
    for s, t, weight in zip(student, teacher, weights or [1.0] * count, strict=True):
        expected += weight * reference.at_loss(as_maps(s), as_maps(t), **options)
    close(result, expected, *features, slack=20)
    first = student[0].detach().clone().requires_grad_()
    finite_gradient(at.at_loss([first, *student[1:]], teacher, **options), first)


@st.composite
def two_alike(draw: Any, shapes: Any) -> tuple[Any, Any]:
    """Two tensors, mostly of one shape."""
    shape = draw(shapes)
    other = draw(st.sampled_from([shape, shape, shape, draw(shapes)]))
    return draw(tensors(shape, 0.1, 15)), draw(tensors(other, 0.1, 15))


logit_shapes = st.tuples(st.integers(0, 4) | st.integers(1, 4), st.integers(1, 6))


@fuzz
@given(two_alike(logit_shapes), st.sampled_from([1, 4.0, 0.1, 1e-3, 1e3, True]) | JUNK)
def test_kd_loss(logits, temperature):
    student, teacher = logits
    result = outcome(at.kd_loss, student, teacher, temperature)
    valid = isinstance(temperature, (int, float)) and 0 < temperature < math.inf
    if not (valid and good(student) and good(teacher) and student.shape == teacher.shape):
        assert refused(result)
        return
    q, p = (array(z) / temperature for z in (teacher, student))
    log_q, log_p = (z - np.logaddexp.reduce(z, axis=1, keepdims=True) for z in (q, p))
    expected = (np.exp(log_q) * (log_q - log_p)).sum() / len(q) * temperature**2
    scale = max(1.0, float(np.abs(array(student)).max() + np.abs(array(teacher)).max()))
    scale *= max(1.0, temperature)
    close(result / scale, expected / scale, student, teacher)
    finite_gradient(at.kd_loss(student.requires_grad_(), teacher, temperature), student)


@fuzz
@given(two_alike(feature_shapes))
def test_full_activation_loss(features):
    student, teacher = features
    result = outcome(at.full_activation_loss, student, teacher)
    if not (good(student) and good(teacher) and student.shape == teacher.shape):
        assert refused(result)
        return
    if student.ndim not in (3, 4):
        assert refused(result)
        return
    rows = [array(f).reshape(len(f), -1) for f in features]
    lengths = [np.maximum(np.linalg.norm(row, axis=1, keepdims=True), 1e-12) for row in rows]
    expected = ((rows[0] / lengths[0] - rows[1] / lengths[1]) ** 2).mean()
    close(result, expected, student, teacher)


@fuzz
@given(two_alike(feature_shapes), st.booleans() | JUNK)
def test_gradient_loss(gradients, squared):
    student, teacher = gradients
    result = outcome(at.gradient_loss, student, teacher, squared)
    fits = good(student) and good(teacher) and student.shape == teacher.shape
    if not (fits and isinstance(squared, bool) and student.ndim >= 2):
        assert refused(result)
        return
    rows = (array(student) - array(teacher)).reshape(len(student), -1)
    norms = (rows**2).sum(1)
    if norms.max() > LARGEST.get(student.dtype, 1e37):
        return
    expected = (norms if squared else np.sqrt(norms)).mean() / 2
    # A difference of half precision is rounded to it before the norm.
    size = float(np.abs(array(student)).max() + np.abs(array(teacher)).max())
    scale = max(1e-18, size**2 * rows.shape[1] if squared else size * rows.shape[1])
    if not refused(result):
        torch.testing.assert_close(
            result.double() / scale, torch.tensor(expected / scale), atol=2e-2, rtol=0
        )


@fuzz
@given(st.data())
def test_input_gradients(data):
    """A linear classifier in float64, whose J and losses on J the reference has in closed form."""
    shape = data.draw(st.tuples(st.integers(1, 4), *[st.integers(1, 3)] * 3))
    x = data.draw(tensors(shape, 0.15, 2))
    labels = data.draw(st.lists(st.integers(-1, CLASSES), min_size=shape[0], max_size=shape[0]))
    y = torch.tensor(labels)
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), CLASSES)).double()
    if data.draw(st.integers(0, 9)) == 0:
        model = data.draw(JUNK)
    function = data.draw(st.sampled_from([at.input_gradient, at.gradient_norm_loss]))
    fits = good(x) and isinstance(model, nn.Module) and 0 <= min(labels) <= max(labels) < CLASSES
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.double()
    result = outcome(function, model, x, y)
    if not fits:
        assert refused(result)
        return
    w, b = (array(parameter) for parameter in model[1].parameters())
    loss, j, *_ = reference.linear_gradient_norm(w, b, array(x).reshape(len(x), -1), y.numpy())
    close(result, j.reshape(shape) if function is at.input_gradient else loss, x)
    flipped = reference.linear_gradient_norm(
        w, b, array(x.flip(-1)).reshape(len(x), -1), y.numpy()
    )[1]
    difference = j.reshape(shape) - flipped.reshape(shape)[..., ::-1]
    close(at.symmetry_loss(model, x, y), (difference**2).sum() / (2 * len(x)), x)


MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2), nn.Flatten(), nn.Linear(4, 5))
IMAGES = torch.ones(2, 3, 6, 6)
RIGHT: dict[str, dict[str, Any]] = {
    "convert_beta": {"beta": 1.0, "source": "authors", "target": "caffe", "positions": 4},
    "stages": {"model": MODEL, "example": IMAGES},
    "pair_stages": {"student": MODEL, "teacher": MODEL, "example": IMAGES},
    "tap": {"model": MODEL, "layers": ["0"]},
    "create_model": {"name": "wrn-10-1", "num_classes": 3},
    "load_student": {"run_folder": "no such run"},
    "load_authors_run": {"folder": "no such run"},
    "TeacherStore": {"folder": "no such store"},
    "create_store": {
        "teacher": MODEL,
        "example": IMAGES,
        "images": 10,
        "views": 1,
        "kind": "sum",
        "p": 2.0,
        "axis": "space",
        "dtype": "float32",
    },
    "symmetry_loss": {"model": MODEL, "x": IMAGES, "y": torch.tensor([0, 1]), "squared": True},
    "preflight": {"transfer": at.Transfer(MODEL), "x": IMAGES, "y": torch.tensor([0, 1])},
}


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, given_ in RIGHT.items() for argument in given_],
)
def test_junk_in_one_argument(name, argument, tmp_path):
    options = dict(RIGHT[name])
    options.pop(argument)
    if name == "create_store":
        options["folder"] = tmp_path / "store"
    junk = JUNK
    if argument == "layers":
        junk = JUNK.filter(lambda value: value not in ([], {}))  # no layer is no mistake

    @fuzz
    @given(junk)
    def check(value: Any) -> None:
        assert refused(outcome(getattr(at, name), **{**options, argument: value})), value

    check()


METHOD_OPTIONS: dict[str, Any] = {
    "beta": st.floats(0, 1e6) | st.integers(0, 100),
    "decay": st.sampled_from(["constant", "linear", "cosine", "step", "warm-up", "warm-up+step"]),
    "alpha": st.floats(0, 1),
    "temperature": st.floats(0.01, 100),
    "squared": st.booleans(),
    "weights": st.lists(st.floats(0, 10), min_size=3, max_size=3) | st.none(),
    **loss_options,
}


@fuzz
@given(st.data())
def test_transfer(data):
    """Its parts are the public functions times the weights, at any progress."""
    names = data.draw(st.lists(st.sampled_from(sorted(METHODS)), unique=True))
    methods, chosen = [], {}
    for name in names:
        kind = METHODS[name]
        accepted = inspect.signature(kind).parameters
        options, wrong = data.draw(
            choose({key: METHOD_OPTIONS[key] for key in METHOD_OPTIONS if key in accepted})
        )
        if wrong == "weights" and options["weights"] in (None, [1.0], [], (1, 2)):
            wrong, options["weights"] = None, None
        method = outcome(kind, **options)
        assert refused(method) == (wrong is not None), (name, options)
        if refused(method):
            return
        methods.append(method)
        chosen[name] = options
    # Equal channels, for maps over channels.
    x = torch.rand(
        data.draw(st.integers(2, 4)), 3, 8, 8, generator=torch.Generator().manual_seed(1)
    )
    y = torch.arange(len(x)) % CLASSES
    student, teacher = Net(4), Net(4, seed=1)
    transfer = make(
        *methods,
        student=student,
        teacher=teacher if any(m.needs_teacher for m in methods) else None,
    )
    progress = data.draw(st.none() | st.floats(0, 1) | st.floats(1.01, 2) | st.just(math.nan))
    result = outcome(transfer.forward, x, y, progress)
    decays = [method.decay for method in methods]
    if progress is None:
        wrong_progress = any(decay != "constant" for decay in decays)
    else:
        wrong_progress = bool(methods) and not 0 <= progress <= 1
    assert refused(result) == wrong_progress
    if wrong_progress:
        return
    assert all(part.isfinite() for part in result.parts.values())
    torch.testing.assert_close(torch.stack(list(result.parts.values())).sum(), result.loss)
    expected = public_parts(chosen, student, teacher, x, y)
    weights = {method.name: float(method.weight(progress)) for method in methods}
    for part, value in expected.items():
        torch.testing.assert_close(result.parts[part], weights[part] * value, rtol=1e-3, atol=1e-3)


def public_parts(
    chosen: dict[str, dict[str, Any]], student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The terms before their weights, from the public functions; not of learned adapters."""
    layers = ["one", "two", "three"]
    (logits, features), (aims, marks) = at.tap(student, layers)(x), at.tap(teacher, layers)(x)
    parts = {}
    for name, options in chosen.items():
        options = {k: v for k, v in options.items() if k not in ("beta", "decay", "alpha")}
        if name == "at" and "beta" in chosen[name]:  # its default makes weights of its own
            options["weights"] = dict(zip(layers, options.get("weights") or [1, 1, 1], strict=True))
            parts[name] = at.at_loss(features, marks, **options)
        elif name == "kd":
            parts[name] = at.kd_loss(logits, aims, **options)
        elif name == "gradient":
            j, goal = (at.input_gradient(network, x, y) for network in (student, teacher))
            parts[name] = at.gradient_loss(j, goal, **options)
        elif name == "symmetry":
            parts[name] = at.symmetry_loss(student, x, y, **options)
        elif name == "min-l2":
            parts[name] = at.gradient_norm_loss(student, x, y)
        elif name == "full":
            pairs = zip(features.values(), marks.values(), strict=True)
            parts[name] = sum(at.full_activation_loss(s, t) for s, t in pairs)
    return parts


@fuzz
@given(st.data())
def test_labels(data):
    """Any labels: the cross-entropy that PyTorch gives, or one line."""
    kind = data.draw(st.sampled_from(["classes", "probabilities", "tensor", "junk"]))
    n = 3
    if kind == "classes":
        values = st.integers(-2, CLASSES) | st.just(-100) | st.integers(0, CLASSES - 1)
        y: Any = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
        classes = [label for label in y.tolist() if label != -100]
        right = bool(classes) and 0 <= min(classes) <= max(classes) < CLASSES
    elif kind == "probabilities":
        values = data.draw(st.lists(st.floats(-0.1, 1), min_size=n * CLASSES, max_size=n * CLASSES))
        y = torch.tensor(values).view(n, CLASSES)
        right = bool((y >= 0).all())
    elif kind == "tensor":
        y, right = data.draw(st.lists(sizes, max_size=3).flatmap(lambda s: tensors(tuple(s)))), None
        right = (
            isinstance(y, Tensor) and good(y) and y.shape == (n, CLASSES) and bool((y >= 0).all())
        )
    else:
        y, right = data.draw(JUNK), False
    transfer = at.Transfer(Net())
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    result = outcome(transfer.forward, x, y)
    assert refused(result) == (not right), y
    if right:
        y = y.to(result.logits.dtype) if y.is_floating_point() else y
        torch.testing.assert_close(result.loss, F.cross_entropy(result.logits, y))


def test_every_public_name_is_fuzzed():
    source = inspect.getsource(inspect.getmodule(test_transfer))
    methods = {kind.__name__ for kind in METHODS.values()}
    # These take no user's values; plot is a module (tests/test_plot.py).
    others = {"Stage", "UserError", "RunError", "__version__", "plot"}
    for name in set(at.__all__) - methods - others:
        assert f"at.{name}" in source or name in RIGHT, name
