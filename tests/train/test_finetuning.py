"""Fine-tuning to other classes: a new head; the other weights and the normalisation stay."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import FLAGS, carry_out, distilled, small, write_factory, write_folder
from torch import nn

import attention_transfer as at
from attention_transfer.config import make_recipe, named_recipe
from attention_transfer.errors import UserError
from attention_transfer.models.network import fixed_size
from attention_transfer.models.start import start_network
from attention_transfer.train.assemble import assemble

pytestmark = pytest.mark.usefixtures("quick_runs")
STILL = {"lr": 1e-12, "weight_decay": 0.0, "max_steps": 1, "epochs": 1, "precision": "fp32"}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
FIXED = """
from torch import nn

class Fixed(nn.Module):
    image_size = 16

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 2, 1)
        self.fc = nn.Linear(4 * 8 * 8, num_classes)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))
"""


def weights(run):
    return load_file(run / "student.safetensors")


def about(run):
    with safe_open(run / "student.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["attention_transfer"])


@pytest.fixture
def images(tmp_path):
    return f"folder:{write_folder(tmp_path / 'images')}"


def test_from_a_run_on_other_data(teacher_run, images, tmp_path):
    recipe = small(
        data=images, student_weights=str(teacher_run), limit_train=None, limit_val=None, **STILL
    )
    said = carry_out(recipe, tmp_path / "run")
    assert f"the student starts from {teacher_run} (wrn-10-1)" in said
    assert (
        "its head has 10 classes, the data has 11, so fc.weight, fc.bias are initialised anew"
        in said
    )
    assert "the student's images are normalised as its weights were trained" in said
    before, after = weights(teacher_run), weights(tmp_path / "run")
    for name, value in after.items():
        if "running" not in name and "num_batches" not in name and not name.startswith("fc."):
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-8)
    assert after["fc.weight"].shape == (11, 64)
    assert about(tmp_path / "run")["mean"] == about(teacher_run)["mean"]
    assert about(tmp_path / "run")["std"] == about(teacher_run)["std"]


def test_from_a_run_on_the_same_data(teacher_run, tmp_path):
    said = carry_out(small(student_weights=str(teacher_run), **STILL), tmp_path / "run")
    assert "anew" not in said and "normalised as" not in said
    torch.testing.assert_close(
        weights(tmp_path / "run")["fc.weight"], weights(teacher_run)["fc.weight"]
    )


def test_from_a_run_with_as_many_other_classes(teacher_run, tmp_path):
    data = f"folder:{write_folder(tmp_path / 'ten', classes=10)}"
    recipe = small(
        data=data, student_weights=str(teacher_run), limit_train=None, limit_val=None, **STILL
    )
    assert "its head has other classes than the data, so fc.weight, fc.bias" in carry_out(
        recipe, tmp_path / "run"
    )
    assert not torch.allclose(
        weights(tmp_path / "run")["fc.weight"], weights(teacher_run)["fc.weight"], atol=1e-3
    )


def test_from_a_file(teacher_run, tmp_path):
    recipe = small(student_weights=str(teacher_run / "student.safetensors"), **STILL)
    assert "the student starts from " in carry_out(recipe, tmp_path / "run")
    torch.testing.assert_close(
        weights(tmp_path / "run")["conv0.weight"], weights(teacher_run)["conv0.weight"]
    )


def test_weights_of_another_network(teacher_run, tmp_path):
    with pytest.raises(
        UserError, match=r"run \(wrn-10-1\) does not fit WideResNet: .* missing"
    ) as error:
        carry_out(small(model="wrn-16-1", student_weights=str(teacher_run)), tmp_path / "run")
    assert not (tmp_path / "run").exists() and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no weights file"):
        carry_out(small(student_weights=str(tmp_path / "none.pt")), tmp_path / "run")


def test_teacher_and_student_to_other_data(teacher_run, images, command):
    """The paper's Table 4 in small: teacher, then student; transfer at the last two groups."""
    common = (
        f"--recipe finetune --data {images} --student-weights {teacher_run} "
        "--image-size 32 --epochs 1 --batch-size 11 "
        "--device cpu --compile off --layer-decay 0.5 --freeze-bn"
    )
    said = command(f"train --model wrn-10-1 {common} --out teacher")
    assert said.status == 0, said.err
    said = command(
        f"distill --student wrn-10-1 --teacher teacher --method at --beta 1 {common} --out student"
    )
    assert said.status == 0, said.err
    assert (
        "group1 ← group1" in said.out
        and "group2 ← group2" in said.out
        and "group0 ← group0" not in said.out
    )
    assert "learning rates by layer: " in said.out


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics(teacher_run, tmp_path, frozen):
    recipe = small(student_weights=str(teacher_run), freeze_bn=frozen, epochs=1)
    said = carry_out(recipe, tmp_path / "run")
    assert "warning: the student is in eval mode" not in said
    before, after = weights(teacher_run), weights(tmp_path / "run")
    kept = [
        torch.equal(after[n], before[n]) for n in before if "running" in n or "num_batches" in n
    ]
    assert all(kept) if frozen else not any(kept)
    assert not torch.equal(after["bn.weight"], before["bn.weight"])  # what it learns goes on


def test_the_warning_about_batch_normalisation_names_the_flag(command, tmp_path):
    student = write_factory(tmp_path, "make_normalised")
    line = f"distill --student {student} --method symmetry --max-steps 2 {FLAGS} --lr 0.01"
    said = command(f"{line} --out a")
    assert said.status == 0, said.err
    assert "the student uses statistics of the batch in 2 layers" in said.out
    assert "(--freeze-bn; in Python, put these layers in eval mode)" in said.out
    assert "statistics of the batch" not in command(f"{line} --out b --freeze-bn").out


def test_nothing_to_freeze(tmp_path):
    with pytest.raises(
        UserError, match="--freeze-bn is given, but the student has no batch normalisation"
    ):
        carry_out(
            small(model="nin-thin-no-bn", freeze_bn=True, limit_train=32, max_steps=1),
            tmp_path / "run",
        )


class TestPairs:
    def test_the_last_ones(self, teacher_run):
        every = assemble(distilled(teacher_run, method="at")).transfer.pairs
        assert len(every) == 3
        for word, count in (("last1", 1), ("last2", 2), ("last3", 3)):
            assert (
                assemble(distilled(teacher_run, method="at", pairs=word)).transfer.pairs
                == every[-count:]
            )

    def test_more_than_there_are(self, teacher_run):
        with pytest.raises(UserError, match="pairs is 'last4', but there are 3: group0=group0, "):
            assemble(distilled(teacher_run, method="at", pairs="last4"))
        with pytest.raises(UserError, match="expected auto, last2, or"):
            distilled(teacher_run, pairs="last0")


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """timm's pretrained weights from a file instead of the network: a network of 1000 classes."""
    import timm

    file = tmp_path / "pretrained.pth"
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), file)
    original = timm.create_model

    def create(name, pretrained=False, **options):
        if pretrained:
            options["pretrained_cfg_overlay"] = {"file": str(file)}
        return original(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", create)
    return source


class TestPretrained:
    def test_it_keeps_its_own_normalisation(self, pretrained):
        network, said = start_network("timm/test_resnet:pretrained", ["a", "b"], MEAN, STD)
        config = pretrained.pretrained_cfg
        assert network.preprocess.mean.flatten().tolist() == pytest.approx(config["mean"])
        assert network.preprocess.std.flatten().tolist() == pytest.approx(config["std"])
        assert torch.equal(network.module.conv1[0].weight, pretrained.conv1[0].weight)
        assert network.module.fc.out_features == 2
        assert "has 1000 classes, the data has 2, so the head is initialised anew" in said[0]
        assert "not by the data's own" in said[1]

    def test_a_plain_one_gets_the_datas(self):
        network, said = start_network("timm/test_resnet", ["a", "b"], MEAN, STD)
        assert network.preprocess.mean.flatten().tolist() == pytest.approx(MEAN) and said == []
        assert network.preprocess.size is None

    def test_it_reaches_the_transfer(self, pretrained):
        parts = assemble(small(model="timm/test_resnet:pretrained"))
        found = parts.transfer.student_transform.mean.flatten().tolist()
        assert found == pytest.approx(pretrained.pretrained_cfg["mean"])

    def test_other_weights_beside(self, pretrained, teacher_run):
        with pytest.raises(
            UserError,
            match="starts from its own weights: leave :pretrained or --student-weights out",
        ):
            start_network("timm/test_resnet:pretrained", ["a"], MEAN, STD, str(teacher_run))


class TestOwnInputSize:
    def test_of_a_vision_transformer(self):
        network, _ = start_network("timm/test_vit", ["a", "b"], MEAN, STD)
        assert network.preprocess.size == (160, 160)
        assert network.module(network.preprocess(torch.rand(1, 3, 32, 32))).shape == (1, 2)

    @pytest.mark.parametrize(
        ("name", "options", "size"),
        [
            # `pretrained_cfg` says 160, 224, 160 and 224, and nothing for the last.
            ("test_vit", {"img_size": 32, "patch_size": 4}, (32, 32)),
            (
                "deit_tiny_patch16_224",
                {"img_size": (32, 48), "patch_size": 4, "depth": 1},
                (32, 48),
            ),
            ("test_coatnet", {"img_size": 64}, (64, 64)),
            ("levit_128s", {}, (224, 224)),
            ("levit_128s", {"img_size": 64}, None),  # it does not tell
            ("test_resnet", {}, None),
        ],
    )
    def test_of_timm_networks_with_arguments(self, name, options, size):
        module = timm.create_model(name, num_classes=2, **options)
        assert fixed_size(module) == size
        assert module.training
        height, width = size or (64, 64)
        assert module.eval()(torch.zeros(1, 3, height, width)).shape == (1, 2)

    def test_of_a_transformer_without_timms_configuration(self):
        module = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=1)
        assert fixed_size(module) == (32, 32)

    @pytest.mark.parametrize(
        ("size", "expected"), [(16, (16, 16)), ([16, 24], (16, 24)), ([3, 16, 16], None)]
    )
    def test_of_a_users_network(self, size, expected):
        module = nn.Identity()
        module.image_size = size
        assert fixed_size(module) == expected

    @pytest.mark.parametrize("image_size", [None, 32])
    def test_a_run_of_a_small_transformer(self, tmp_path, image_size):
        (tmp_path / "vit.py").write_text(
            "import timm\ndef make(num_classes):\n"
            "    return timm.create_model(\n"
            "        'test_vit', num_classes=num_classes, img_size=32, patch_size=4)\n"
        )
        model = f"{tmp_path / 'vit.py'}:make"
        carry_out(small(model=model, image_size=image_size, **STILL), tmp_path / "run")
        assert about(tmp_path / "run")["image_size"] == [32, 32]

    def test_a_run_from_end_to_end(self, tmp_path, teacher_run):
        """Images of 32×32 for a student of 16×16 and a teacher of 32×32."""
        (tmp_path / "fixed.py").write_text(FIXED)
        recipe = distilled(
            teacher_run, method="kd", model=f"{tmp_path / 'fixed.py'}:Fixed", max_steps=2
        )
        carry_out(recipe, tmp_path / "run")
        student = at.load_student(tmp_path / "run", trust_code=True)
        assert student.image_size == (16, 16)
        assert student(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["finetune", "imagenet"])
def test_the_recipes(name):
    recipe = make_recipe(named_recipe(name), {"model": "timm/resnet18"})
    assert recipe.image_size == 224 and recipe.optimizer == "sgd" and not recipe.nesterov


def test_the_papers_imagenet():
    recipe = make_recipe(named_recipe("imagenet"), {"model": "timm/resnet18"})
    assert (recipe.lr, recipe.momentum, recipe.weight_decay, recipe.batch_size) == (
        0.1,
        0.9,
        1e-4,
        256,
    )
    assert (recipe.schedule, recipe.milestones, recipe.lr_decay, recipe.epochs) == (
        "step",
        (30, 60, 90),
        0.1,
        100,
    )
