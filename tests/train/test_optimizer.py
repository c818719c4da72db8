"""The optimiser's options, each against numbers computed another way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_runs import (
    STEPS_PER_EPOCH,
    carry_out,
    distilled,
    request_stop,
    rows,
    small,
    stop_after,
    write_factory,
)
from torch import nn
from toys import CLASSES, Net, assert_same, batch, make, make_all

import attention_transfer as at
from attention_transfer.apply.evaluate import evaluate_network
from attention_transfer.errors import UserError
from attention_transfer.train.optimizer import (
    Update,
    describe_rates,
    layer_numbers,
    make_optimizer,
    make_scheduler,
    peak_lr,
)
from attention_transfer.train.regularize import make_mix
from attention_transfer.train.signals import Interrupted

EVERYTHING = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup_epochs": 1.5,
    "accumulate": 3,
    "lr_reference_batch": 16,
    "clip_norm": 1.0,
    "weight_decay_on_norm": False,
    "head_lr": 1e-2,
    "layer_decay": 0.7,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "ema": 0.9,
}


def weights(run):
    return load_file(run / "student.safetensors")


def rates(recipe, model, example=None):
    """{the student's parameter: (rate, decay)}."""
    transfer = at.Transfer(model)
    names = {id(p): n for n, p in model.named_parameters()}
    lr = peak_lr(recipe, recipe.batch_size)
    groups = make_optimizer(recipe, transfer, example, lr).param_groups
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.usefixtures("quick_runs")
class TestRuns:
    def test_accumulated_parts_are_one_big_batch(self, teacher_run, tmp_path):
        """Without batch normalisation; 32 images in parts of 11, 11 and 10."""
        options = {
            "model": write_factory(tmp_path),
            "precision": "fp32",
            "method": "kd",
            "epochs": 1,
        }
        for name, parts in (("one", 1), ("three", 3)):
            carry_out(distilled(teacher_run, **options, accumulate=parts), tmp_path / name)
        assert_same(weights(tmp_path / "three"), weights(tmp_path / "one"), rtol=0, atol=1e-6)
        (one,), (three,) = rows(tmp_path / "one"), rows(tmp_path / "three")
        assert one["step"] == three["step"] == STEPS_PER_EPOCH and one["lr"] == three["lr"]
        assert three["train_loss"] == pytest.approx(one["train_loss"], abs=1e-6)
        assert three["parts"] == pytest.approx(one["parts"], abs=1e-5)
        assert three["train_accuracy"] == one["train_accuracy"]

    def test_everything_at_once_is_continued_bit_for_bit(self, teacher_run, tmp_path):
        recipe = distilled(teacher_run, method="at+kd", **EVERYTHING)
        said = carry_out(recipe, tmp_path / "alone")
        assert (
            "learning rate 0.002 = 0.001 × batch 32 / 16" in said
            and "learning rates by layer: " in said
        )
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, STEPS_PER_EPOCH + 2, request_stop)
            with pytest.raises(Interrupted):
                carry_out(recipe, tmp_path / "run")
        carry_out(recipe, tmp_path / "run")
        name = "student.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert rows(tmp_path / "run") == rows(tmp_path / "alone")

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_mixed_labels_keep_their_precision(self, tmp_path, monkeypatch, precision):
        original, seen = at.Transfer.forward, []

        def watched(self, x, y, progress=None, **options):
            seen.append((x.dtype, y))
            return original(self, x, y, progress, **options)

        monkeypatch.setattr(at.Transfer, "forward", watched)
        carry_out(small(mixup=1.0, precision=precision, max_steps=2), tmp_path / "run")
        trained = [(x, y) for x, y in seen if y.is_floating_point()]  # the others are preflight's
        assert len(trained) == 2
        for dtype, y in trained:
            assert dtype == y.dtype == torch.float32 and y.shape == (32, 10)
            torch.testing.assert_close(y.sum(1), torch.ones(32))
            assert not torch.equal(y, y.bfloat16().float())

    def test_the_average_by_hand(self, tmp_path, monkeypatch):
        """At step t = 1, 2, … the average keeps min(decay, 1 − t^(−2/3)) of its value."""
        from attention_transfer.train.trainer import Trainer

        original, seen = Trainer.train_step, []

        def watched(self, *words):
            original(self, *words)
            seen.append({k: v.double() for k, v in self.module.student.state_dict().items()})

        monkeypatch.setattr(Trainer, "train_step", watched)
        carry_out(small(ema=0.5, precision="fp32"), tmp_path / "run")
        average = seen[0]
        for t, state in enumerate(seen, 1):
            kept = min(0.5, 1 - t ** (-2 / 3))
            average = {k: kept * v + (1 - kept) * state[k] for k, v in average.items()}
        found = weights(tmp_path / "run")
        assert not torch.allclose(found["fc.weight"].double(), seen[-1]["fc.weight"], atol=1e-5)
        for key, value in found.items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), average[key], rtol=0, atol=1e-6)
            else:
                assert value == len(seen)
        again = evaluate_network(str(tmp_path / "run"), device="cpu")
        assert again["loss"] == pytest.approx(rows(tmp_path / "run")[-1]["val_loss"], abs=1e-5)

    def test_more_parts_than_images(self, tmp_path):
        with pytest.raises(
            UserError, match="a batch of 10 images cannot be split into 11 micro-batches"
        ):
            carry_out(small(limit_train=10, accumulate=11), tmp_path / "run")

    def test_a_run_from_before_these_options_is_continued(self, teacher_run, tmp_path):
        import shutil

        import yaml

        shutil.copytree(teacher_run, tmp_path / "run")
        file = tmp_path / "run" / "config.yaml"
        before = {
            k: v
            for k, v in yaml.safe_load(file.read_text()).items()
            if k not in EVERYTHING or k == "lr"
        }
        file.write_text(yaml.safe_dump({**before, "schedule": "one-cycle"}, sort_keys=False))
        assert "is finished" in carry_out(small(), tmp_path / "run")
        with pytest.raises(UserError, match=r"ema is None in that run, 0\.9 in this command"):
            carry_out(small(ema=0.9), tmp_path / "run")


class TestSteps:
    def make(self, recipe, lr=1.0):
        model = nn.Linear(4, 3)
        transfer = at.Transfer(model)
        return model, Update(
            recipe,
            torch.optim.SGD(model.parameters(), lr),
            transfer.trainable_parameters(),
            steps_per_epoch=4,
        )

    @pytest.mark.parametrize(("size", "moved"), [(10.0, 0.5), (0.1, 0.1)])
    def test_clipping(self, size, moved):
        model, update = self.make(small(clip_norm=0.5))
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        direction = F.normalize(torch.arange(1.0, 16), dim=0)
        for p, part in zip(
            model.parameters(), (direction[:12].view(3, 4), direction[12:]), strict=True
        ):
            p.grad = size * part
        update(update.optimizer.step, 0)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(before - after, moved * direction, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("options", "scheduled"),
        [
            ({"schedule": "constant"}, lambda t: 1.0),
            ({"schedule": "cosine"}, lambda t: (1 + math.cos(math.pi * t / 12)) / 2),
            (
                {"schedule": "step", "milestones": [2], "lr_decay": 0.1},
                lambda t: 1.0 if t < 4 else 0.1,
            ),
        ],
    )
    def test_warm_up(self, options, scheduled):
        recipe = small(lr=0.3, warmup_epochs=1.5, **options)
        _, update = self.make(recipe, 0.3)
        scheduler = make_scheduler(recipe, update.optimizer, 4, 12)
        used, said = [], []
        for step in range(12):
            said.append(update.lr(step))
            update(lambda: used.append(update.optimizer.param_groups[0]["lr"]), step)
            update.optimizer.step()
            scheduler.step()
        expected = [0.3 * scheduled(t) * min(1, (t + 1) / 6) for t in range(12)]
        assert used == pytest.approx(expected) and said == pytest.approx(used)

    def test_every_group_goes_through_its_own_cycle(self):
        recipe = small(head_lr=0.4, lr=0.2)
        model = Net()
        optimizer = make_optimizer(recipe, at.Transfer(model), batch()[0])
        scheduler = make_scheduler(recipe, optimizer, 4, 40)
        seen = []
        for _ in range(39):
            seen.append([g["lr"] for g in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        assert all(head == pytest.approx(2 * body) for body, head in seen)
        assert max(seen) == pytest.approx([0.2, 0.4])


class TestGroups:
    def test_one_rate_for_all_by_default(self):
        optimizer = make_optimizer(small(), at.Transfer(Net()))
        assert len(optimizer.param_groups) == 1 and "lr_scale" not in optimizer.param_groups[0]
        assert (
            isinstance(optimizer, torch.optim.SGD) and describe_rates(small(), 32, optimizer) == []
        )

    def test_the_rate_of_a_larger_batch(self):
        recipe = small(lr=0.1, batch_size=1024, lr_reference_batch=256, head_lr=0.3)
        assert peak_lr(recipe, 1024) == 0.4
        found = rates(recipe, Net(), batch()[0])
        assert found["one.0.weight"][0] == 0.4 and found["fc.bias"][0] == pytest.approx(1.2)

    def test_adamw(self):
        recipe = small(optimizer="adamw", lr=1e-3, momentum=0.8, weight_decay=0.05)
        optimizer = make_optimizer(recipe, at.Transfer(Net()))
        assert isinstance(optimizer, torch.optim.AdamW)
        assert (
            optimizer.defaults["betas"] == (0.8, 0.999)
            and optimizer.defaults["weight_decay"] == 0.05
        )

    def test_decay_of_matrices_alone(self):
        model = at.create_model("wrn-10-1", 3)
        found = rates(small(weight_decay_on_norm=False, weight_decay=0.1), model)
        assert len(found) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert found[name] == (0.2, 0.1 if parameter.ndim > 1 else 0.0), name
        assert {d for _, d in rates(small(weight_decay=0.1), model).values()} == {0.1}

    def test_what_a_network_itself_spares(self):
        model = at.create_model("timm/test_vit", 3)
        found = rates(small(weight_decay_on_norm=False, weight_decay=0.1), model)
        assert found["pos_embed"][1] == found["cls_token"][1] == found["norm.weight"][1] == 0.0
        assert found["blocks.0.attn.qkv.weight"][1] == 0.1

    def test_rates_by_stage(self):
        model = at.create_model("wrn-10-1", 3)
        found = rates(small(layer_decay=0.5, lr=0.8), model, torch.rand(2, 3, 16, 16))
        expected = {"conv0": 0.1, "group0": 0.1, "group1": 0.2, "group2": 0.4, "bn": 0.4, "fc": 0.8}
        assert {n: r for n, (r, _) in found.items()} == {
            n: expected[n.partition(".")[0]] for n in found
        }
        said = describe_rates(small(layer_decay=0.5, lr=0.8), 32, make_optimizer(
            small(layer_decay=0.5, lr=0.8), at.Transfer(model), torch.rand(2, 3, 16, 16)
        ))  # fmt: skip
        assert said[0].startswith("learning rates by layer: 0.1 (") and said[0].endswith(
            "0.8 (195 weights)"
        )

    def test_the_heads_own_rate_wins(self):
        found = rates(small(layer_decay=0.5, lr=0.8, head_lr=2.0), Net(), batch()[0])
        assert [
            found[n][0] for n in ("one.0.weight", "two.0.bias", "three.0.weight", "fc.weight")
        ] == [pytest.approx(r) for r in (0.1, 0.2, 0.4, 2.0)]

    @pytest.mark.parametrize("name", ["timm/resnet10t", "timm/test_vit"])
    def test_timms_own_layers(self, name):
        from timm.optim import param_groups_layer_decay

        model = at.create_model(name, 3)
        found = rates(small(layer_decay=0.5, lr=1.0), model, torch.rand(1, 3, 160, 160))
        names = {id(p): n for n, p in model.named_parameters()}
        groups = param_groups_layer_decay(model, layer_decay=0.5)
        assert {n: r for n, (r, _) in found.items()} == {
            names[id(p)]: pytest.approx(g["lr_scale"]) for g in groups for p in g["params"]
        }

    def test_a_head_that_comes_first(self):
        model = nn.Sequential()
        model.fc, model.body = nn.Linear(4, CLASSES), nn.Conv2d(3, 4, 3, 2, 1)
        model.forward = lambda x: model.fc(model.body(x).mean((2, 3)))
        with pytest.raises(UserError, match="needs example="):
            layer_numbers(model, ["fc.weight", "fc.bias"], None)
        found = layer_numbers(model, ["fc.weight", "fc.bias"], batch()[0])
        assert found == {"fc.weight": 1, "fc.bias": 1, "body.weight": 0, "body.bias": 0}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"optimizer": "adam"}, "optimizer is 'adam': .*did you mean adamw"),
            ({"accumulate": 0}, "expected a whole number ≥ 1"),
            ({"accumulate": 33}, "at most the batch size, 32"),
            ({"lr_reference_batch": 0}, "expected a whole number ≥ 1"),
            ({"warmup_epochs": 5}, "one-cycle has its own warm-up"),
            ({"warmup_epochs": -1, "schedule": "step"}, "expected a number ≥ 0"),
            ({"clip_norm": 0}, "expected a number > 0"),
            ({"clip_norm": math.inf}, "expected a number > 0"),
            ({"head_lr": 0}, "expected a number > 0"),
            ({"layer_decay": 1.1}, "> 0 and ≤ 1"),
            ({"label_smoothing": 1.0}, "≥ 0 and < 1"),
            ({"mixup": -0.1}, "expected a number ≥ 0"),
            ({"cutmix": math.nan}, "expected a number ≥ 0"),
            ({"ema": 1.0}, "> 0 and < 1"),
            ({"optimizer": "adamw", "momentum": 1.0}, "below 1"),
        ],
    )
    def test_wrong_words(self, options, words):
        with pytest.raises(UserError, match=words):
            small(**options)


class TestLabels:
    def test_smoothing_is_of_the_cross_entropy_alone(self):
        x, y = batch(dtype=torch.float64)
        methods = (at.KnowledgeDistillation(0.3), at.GradientNorm())
        plain, smooth = (make(*methods, label_smoothing=s).double()(x, y) for s in (0.0, 0.2))
        target = 0.8 * F.one_hot(y, CLASSES).double() + 0.2 / CLASSES
        expected = -0.7 * (target * plain.logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(smooth.parts["ce"], expected, rtol=1e-12, atol=1e-12)
        for part in ("kd", "min-l2"):
            assert torch.equal(smooth.parts[part], plain.parts[part])
        with pytest.raises(
            UserError, match=r"label_smoothing is 1.0: expected a number in \[0, 1\)"
        ):
            make(label_smoothing=1.0)

    def test_certain_soft_labels_are_hard_ones(self):
        x, y = batch()
        transfer = make_all()
        hard, soft = (transfer(x, labels, 0.5) for labels in (y, F.one_hot(y, CLASSES).float()))
        assert_same(soft.parts, hard.parts, rtol=1e-5, atol=1e-6)

    def test_soft_labels(self):
        x, y = batch(dtype=torch.float64)
        first, second = F.one_hot(y, CLASSES).double(), F.one_hot(y.flip(0), CLASSES).double()
        mixed = 0.7 * first + 0.3 * second
        out = make(student=Net().double(), label_smoothing=0.1, example=None).double()(x, mixed)
        target = 0.9 * mixed + 0.1 / CLASSES
        torch.testing.assert_close(out.loss, -(target * out.logits.log_softmax(1)).sum(1).mean())
        # The cross-entropy is linear in the labels, and so is J.
        j = [at.input_gradient(Net().double(), x, labels) for labels in (mixed, y, y.flip(0))]
        torch.testing.assert_close(j[0], 0.7 * j[1] + 0.3 * j[2])
        with pytest.raises(UserError, match=r"soft labels \(4, 3\) for logits \(4, 5\)"):
            make()(x.float(), mixed[:, :3].float())


class TestMixing:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3)).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.arange(6) % CLASSES

    def mixed(self, **options):
        x, soft = make_mix(small(**options), CLASSES)(self.x, self.y)
        assert x.is_contiguous(memory_format=torch.channels_last)
        first, second = F.one_hot(self.y, CLASSES), F.one_hot(self.y.roll(1), CLASSES)
        share = soft[
            1, self.y[1]
        ]  # the second image's own; the first is mixed with one of its own class
        torch.testing.assert_close(soft, share * first + (1 - share) * second)
        return x, share

    def test_off(self):
        assert make_mix(small(), CLASSES) is None

    def test_mixup(self):
        torch.manual_seed(0)
        x, share = self.mixed(mixup=1.0)
        assert 0 < share < 1
        torch.testing.assert_close(x, share * self.x + (1 - share) * self.x.roll(1, 0))

    def test_cutmix(self):
        torch.manual_seed(1)
        x, share = self.mixed(cutmix=1.0)
        own, other = (x == self.x).all(1), (x == self.x.roll(1, 0)).all(1)
        assert (own ^ other).all() and 0 < share < 1
        assert own[0].float().mean().item() == pytest.approx(share.item())

    def test_one_of_both(self):
        torch.manual_seed(0)
        kinds = set()
        for _ in range(20):
            x, _ = self.mixed(mixup=1.0, cutmix=1.0)
            kinds.add(bool(((x == self.x) | (x == self.x.roll(1, 0))).all()))  # pasted, or blended
        assert kinds == {True, False}

    def test_accuracy_is_of_the_larger_share(self):
        from attention_transfer.train.meter import Meter

        meter = Meter(["ce"], torch.device("cpu"))
        logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
        soft = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
        meter.update(logits, soft, {"ce": torch.tensor(0.5)}, 1)
        fabric = SimpleNamespace(all_reduce=lambda t, reduce_op: t, world_size=1)
        loss, right, _ = meter.means(fabric)
        assert right == 0.5
        assert loss == pytest.approx(-(soft * logits.log_softmax(1)).sum(1).mean().item())
