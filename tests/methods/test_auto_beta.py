"""beta="auto": a weight for each pair that does not depend on the size of its maps."""

import pytest
import torch
from toys import Net, batch, make
from torch import nn

import attention_transfer as at
from attention_transfer.methods.activation import AUTO_WEIGHT

PAIRS = ["one=one", "two=two", "three=three"]


def parts(**options: object) -> torch.Tensor:
    return make(at.ActivationTransfer(**options))(*batch()).parts["at"]


@pytest.mark.parametrize("convention", ["authors", "caffe"])
@pytest.mark.parametrize("kind", ["sum", "max"])
def test_conventions_of_the_square_are_the_same_loss(convention: str, kind: str) -> None:
    auto = parts(convention=convention, kind=kind)
    expected = parts(beta=AUTO_WEIGHT, convention="caffe", kind=kind)
    torch.testing.assert_close(auto, expected, rtol=1e-6, atol=0)


def test_under_the_papers_norm_the_weight_is_that_of_the_norm() -> None:
    expected = parts(beta=AUTO_WEIGHT, convention="paper")
    torch.testing.assert_close(parts(convention="paper"), expected, rtol=1e-6, atol=0)


def test_without_an_example_the_sizes_come_from_the_batch() -> None:
    x, y = batch()
    pairs = [("one", "one"), ("three", "three")]
    known = make(at.ActivationTransfer(), pairs=pairs)(x, y).parts["at"]
    unknown = make(at.ActivationTransfer(), pairs=pairs, example=None)(x, y).parts["at"]
    torch.testing.assert_close(known, unknown)


def test_weights_of_the_pairs_multiply_it() -> None:
    methods = [at.ActivationTransfer(weights=w) for w in ([1, 0, 0], [0, 1, 0], [0, 0, 2])]
    one, two, three = (make(m)(*batch()).parts["at"] for m in methods)
    torch.testing.assert_close(parts(), one + two + three / 2)


def test_the_beta_of_each_pair_is_recorded_with_its_schedule() -> None:
    transfer = make(at.ActivationTransfer(decay="linear"))
    whole, half = transfer.weights(0.0), transfer.weights(0.5)
    assert list(whole) == [f"beta[{pair}]" for pair in PAIRS]
    student, _ = transfer.features(batch()[0])
    for name, features in zip(whole, student, strict=True):
        assert whole[name] == AUTO_WEIGHT * features.shape[2:].numel() / 2
        assert half[name] == whole[name] / 2


class Uniform(nn.Module):
    """Wraps a layer; its features are the same for every image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * 0 + 1


def test_a_teachers_map_without_information_is_left_out() -> None:
    teacher = Net(8, seed=1)
    teacher.two = Uniform(teacher.two)
    transfer = make(at.ActivationTransfer(), teacher=teacher)
    weights = transfer.weights(None)
    assert weights["beta[two=two]"] == 0 and weights["beta[one=one]"] > 0
    _, line, _ = transfer.methods[0].describe(transfer.pairs, *transfer.features(batch()[0]))
    assert "left out: the teacher's map is the same for every image" in line


def test_a_students_map_that_is_not_trained_is_left_out() -> None:
    student = Net()
    student.one.requires_grad_(False)
    transfer = make(at.ActivationTransfer(), student=student)
    weights = transfer.weights(None)
    assert weights["beta[one=one]"] == 0 and weights["beta[two=two]"] > 0
    line, *_ = transfer.methods[0].describe(transfer.pairs, *transfer.features(batch()[0]))
    assert "left out: no weight that is trained changes the student's map" in line


def test_another_method_has_no_automatic_beta() -> None:
    with pytest.raises(at.UserError, match="beta is 'auto': expected a finite number"):
        at.GradientTransfer("auto")
    with pytest.raises(at.UserError, match="beta is 'much': expected"):
        at.ActivationTransfer("much")
