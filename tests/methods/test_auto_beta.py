"""beta="auto": the share of the variance of the teacher's maps that is not explained."""

import pytest
import torch
from torch import Tensor, nn
from toys import Net, batch, make

import attention_transfer as at
from attention_transfer.methods.auto import AUTO_WEIGHT

PAIRS = ["one=one", "two=two", "three=three"]


def images(count: int = 16) -> Tensor:
    torch.manual_seed(5)
    return torch.rand(count, 3, 8, 8)


def auto(**options: object) -> at.Transfer:
    return make(at.ActivationTransfer(**options), example=images())


def part(**options: object) -> Tensor:
    return auto(**options)(*batch()).parts["at"]


def formula(transfer: at.Transfer, x: Tensor, squared: bool) -> Tensor:
    """The term of the documentation, by hand."""

    def distances(differences: list[Tensor]) -> Tensor:
        norms = torch.stack([d.norm(dim=1) for d in differences])
        return (norms.square() if squared else norms).mean(1) / 2

    example = [at.attention_map(f).double() for f in transfer.features(images())[1]]
    freedom = 15 / 16
    spread = distances([y - y.mean(0) for y in example]) / (freedom if squared else freedom**0.5)
    student, teacher = transfer.features(x)
    pairs = zip(student, teacher, strict=True)
    now = distances([at.attention_map(s) - at.attention_map(t) for s, t in pairs])
    return AUTO_WEIGHT * now.sum() / spread.sum()


@pytest.mark.parametrize("convention", ["authors", "caffe", "paper"])
def test_the_term_is_the_formula(convention: str) -> None:
    x, y = batch()
    transfer = auto(convention=convention)
    expected = formula(transfer, x, squared=convention != "paper")
    torch.testing.assert_close(transfer(x, y).parts["at"].double(), expected.double())


def test_conventions_of_the_square_are_the_same_loss() -> None:
    torch.testing.assert_close(part(convention="authors"), part(convention="caffe"))


def test_neither_the_size_of_the_maps_nor_the_number_of_pairs_changes_its_scale() -> None:
    """A student that shows the teacher's mean maps has a term of AUTO_WEIGHT."""
    x = images()
    for pairs in ([("one", "one")], [("one", "one"), ("three", "three")]):
        transfer = make(at.ActivationTransfer(), example=x, pairs=pairs)
        method, features = transfer.methods[0], transfer.features(x)[1]
        total = 0.0
        for beta, f in zip(method.pair_betas(), features, strict=True):
            y = at.attention_map(f)
            total += beta * (y - y.mean(0)).square().mean().item()
        assert total == pytest.approx(AUTO_WEIGHT * 15 / 16, rel=1e-5)


def test_weights_of_the_pairs_multiply_it() -> None:
    one, two, three = (part(weights=w) for w in ([1, 0, 0], [0, 1, 0], [0, 0, 2]))
    torch.testing.assert_close(part(), one + two + three / 2)


def test_the_beta_of_each_pair_is_recorded_with_its_schedule() -> None:
    transfer = auto(decay="linear")
    whole, half = transfer.weights(0.0), transfer.weights(0.5)
    assert list(whole) == [f"beta[{pair}]" for pair in PAIRS]
    assert list(whole.values()) == transfer.methods[0].pair_betas()
    assert all(half[name] == whole[name] / 2 for name in whole)


def test_it_is_part_of_the_state() -> None:
    transfer, other = auto(), make(at.ActivationTransfer(), example=batch()[0])
    assert other.weights(None) != transfer.weights(None)
    other.load_state_dict(transfer.state_dict())
    assert other.weights(None) == transfer.weights(None)


def whole(features: Tensor) -> Tensor:
    """Normalised activations (N, C·H·W)."""
    return nn.functional.normalize(features.flatten(1), dim=1)


def test_full_activations_have_the_same_scale() -> None:
    x = images()
    transfer = make(at.FullActivationTransfer("auto"), example=x)
    method, features = transfer.methods[0], transfer.features(x)[1]
    total = 0.0
    for beta, f in zip(method.pair_betas(), features, strict=True):
        y = whole(f)
        total += beta * (y - y.mean(0)).square().mean().item()
    assert total == pytest.approx(AUTO_WEIGHT * 15 / 16, rel=1e-5)
    assert list(transfer.weights(None)) == [f"beta[{pair}]" for pair in PAIRS]


def test_full_activations_are_weighed_pair_by_pair() -> None:
    x, y = batch()
    transfer = make(at.FullActivationTransfer("auto"), example=images())
    expected = 0.0
    parts = zip(transfer.methods[0].adapters, transfer.methods[0].pair_betas(), strict=True)
    for (adapter, beta), s, t in zip(parts, *transfer.features(x), strict=True):
        expected += beta * at.full_activation_loss(adapter(s), t).item()
    assert transfer(x, y).parts["full"].item() == pytest.approx(expected, rel=1e-5)


class Uniform(nn.Module):
    """Wraps a layer; its features are the same for every image."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 0 + 1


def reasons(transfer: at.Transfer) -> list[str]:
    lines = transfer.methods[0].describe(transfer.pairs, *transfer.features(images()))
    return [line.partition("; left out: ")[2] for line in lines]


def test_a_teachers_map_without_information_is_left_out() -> None:
    teacher = Net(8, seed=1)
    teacher.two = Uniform(teacher.two)
    transfer = make(at.ActivationTransfer(), teacher=teacher, example=images())
    weights = transfer.weights(None)
    assert weights["beta[two=two]"] == 0 and weights["beta[one=one]"] > 0
    assert reasons(transfer)[1] == "the teacher's map is the same for every image"


def test_a_teachers_activation_without_information_is_left_out() -> None:
    teacher = Net(8, seed=1)
    teacher.two = Uniform(teacher.two)
    transfer = make(at.FullActivationTransfer("auto"), teacher=teacher, example=images())
    assert transfer.weights(None)["beta[two=two]"] == 0
    assert reasons(transfer)[1] == "the teacher's activation is the same for every image"


def test_a_students_map_that_is_not_trained_is_left_out() -> None:
    student = Net()
    student.one.requires_grad_(False)
    transfer = make(at.ActivationTransfer(), student=student, example=images())
    weights = transfer.weights(None)
    assert weights["beta[one=one]"] == 0 and weights["beta[two=two]"] > 0
    assert reasons(transfer)[0] == "no weight that is trained changes the student's map"


@pytest.mark.parametrize("example", [None, images(1)])
def test_it_needs_an_example_of_several_images(example: Tensor | None) -> None:
    with pytest.raises(at.UserError, match="needs example|expected an example of several images"):
        make(at.ActivationTransfer(), example=example, pairs=[("one", "one")])


def test_another_method_has_no_automatic_beta() -> None:
    with pytest.raises(at.UserError, match="beta is 'auto': expected a finite number"):
        at.GradientTransfer("auto")
    with pytest.raises(at.UserError, match="beta is 'much': expected"):
        at.ActivationTransfer("much")
