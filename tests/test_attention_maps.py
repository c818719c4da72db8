"""Attention of a transformer as the map: the loss, `Transfer`, a store, the command."""

import pytest
import timm
import torch
from toys import Net, close, make

import attention_transfer as at
from attention_transfer.maps import normalize_map

SIZE, PATCHES = 64, 4
TEACHER, STUDENT = "blocks.1", "three"


def vit(seed=0, classes=5, size=SIZE):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, num_classes=classes)


def batch(n=4):
    torch.manual_seed(1)
    return torch.rand(n, 3, SIZE, SIZE), torch.arange(n) % 5


def transfer(*methods, student=None, **options):
    """From a vision transformer to a network whose last map is 16×16."""
    options = {"pairs": [(STUDENT, TEACHER)], "example": batch()[0]} | options
    return make(*methods, student=student or Net(), teacher=vit(), **options)


def attention_of(model, x, layer=TEACHER):
    with torch.no_grad(), at.tap(model.eval(), [layer], attention=True) as tapped:
        return tapped(x)[1][layer]


def test_the_map_is_the_mean_over_the_heads():
    attention = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    q = attention.mean(1).flatten(1)
    close(at.attention_map(attention, kind="attention", normalize=False), q)
    close(at.attention_map(attention, kind="attention", p=4), q / q.norm(dim=1, keepdim=True))


def test_the_loss_compares_a_students_features_with_a_teachers_attention():
    torch.manual_seed(0)
    student = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    teacher = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    pooled = torch.nn.functional.avg_pool2d(student.square().sum(1), 2)
    d = normalize_map(pooled.flatten(1)) - normalize_map(teacher.mean(1).flatten(1))
    close(at.at_loss(student, teacher, teacher_kind="attention"), d.square().mean())
    expected = at.at_loss(teacher, teacher.flip(0), kind="attention")
    flipped = normalize_map(teacher.mean(1).flatten(1))
    close(expected, (flipped - flipped.flip(0)).square().mean())


@pytest.mark.parametrize("resize", ["map", "features", "bilinear"])
def test_a_student_that_has_the_map_has_no_loss(resize):
    attention = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    student = attention.mean(1, keepdim=True).sqrt()  # its square is the map
    assert at.at_loss(student, attention, teacher_kind="attention", resize=resize) < 1e-20


def test_wrong_uses_are_refused_in_words():
    attention = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"expected attention \(N, heads, H, W\)"):
        at.attention_map(torch.rand(2, 16, 8), kind="attention")
    with pytest.raises(ValueError, match="choose axis='space'"):
        at.attention_map(attention, kind="attention", axis="channel")
    with pytest.raises(ValueError, match="teacher_kind"):
        at.at_loss(attention, attention, teacher_kind="atention")
    with pytest.raises(ValueError, match="one reads attention and the other features"):
        transfer(at.ActivationTransfer(teacher_kind="attention"), at.FullActivationTransfer())
    with pytest.raises(ValueError, match="the teacher: layer 'one' has no attention"):
        make(at.ActivationTransfer(teacher_kind="attention"))


def test_a_transformer_teaches_a_convolutional_network():
    x, y = batch()
    method = at.ActivationTransfer(beta=2, teacher_kind="attention")
    moved = transfer(method)
    out = moved(x, y)
    with at.tap(moved.student, [STUDENT]) as tapped:
        features = tapped(x)[1][STUDENT]
    expected = 2 * at.at_loss(features, attention_of(vit(), x), teacher_kind="attention")
    close(out.parts["at"], expected, 1e-5)
    out.loss.backward()
    assert moved.student.one[0].weight.grad.abs().max() > 0


def test_auto_finds_the_pair_and_its_weight():
    student = timm.create_model("resnet18", num_classes=5)
    method = at.ActivationTransfer(teacher_kind="attention")
    moved = transfer(method, student=student, pairs="auto")
    assert moved.pairs == [("layer3", TEACHER)]
    assert moved.weights(0.0)["beta[layer3=blocks.1]"] > 0
    assert moved(*batch()).loss.isfinite()


def test_a_student_learns_with_its_own_attention():
    x, y = batch()
    student = vit(seed=1)
    moved = transfer(at.ActivationTransfer(kind="attention"), student=student, pairs="auto")
    assert moved.pairs == [(TEACHER, TEACHER)]
    before = student.blocks[1].attn.qkv.weight.detach().clone()
    optimizer = torch.optim.Adam(moved.trainable_parameters(), 1e-3)
    losses = []
    for _ in range(8):
        part = moved(x, y).parts["at"]
        losses.append(part.item())
        optimizer.zero_grad()
        part.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(before[:192], student.blocks[1].attn.qkv.weight[:192])


def test_is_the_same_compiled():
    x, y = batch(2)
    method = at.ActivationTransfer(beta=2, kind="attention")
    moved = transfer(method, student=vit(seed=1), pairs="auto")
    moved.student.eval()
    expected = moved(x, y)
    moved.compile(fullgraph=True, backend="eager")
    out = moved(x, y)
    close(out.loss, expected.loss, 1e-5)
    out.loss.backward()
    assert moved.student.blocks[1].attn.qkv.weight.grad.abs().max() > 0


def test_a_store_keeps_the_attention(tmp_path):
    x, y = batch()
    teacher = vit().eval()
    options = {"images": 4, "kind": "attention", "dtype": "float32"}
    store = at.create_store(tmp_path / "store", teacher, x, **options)
    assert [entry.name for entry in store.header.arrays] == ["logits", f"{TEACHER}.attention"]
    rows = torch.arange(4)
    with torch.no_grad():
        store.add(rows, 0, teacher(x), {TEACHER: attention_of(teacher, x)})
    method = at.ActivationTransfer(beta=2, teacher_kind="attention")
    pairs = [(STUDENT, TEACHER)]
    from_store = at.Transfer(Net(), store, [method], pairs=pairs, example=x)
    part = from_store(x, y, teacher=from_store.store.read(rows)).parts["at"]
    close(part, transfer(method)(x, y).parts["at"], 1e-5)
