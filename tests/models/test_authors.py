"""The authors' runs against a plain evaluation of their networks, and errors for other files."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
from authors_files import resnet, resnet_params, write_run, wrn, wrn_params
from test_models import Explosive

import attention_transfer as at
from attention_transfer.models.authors import load_authors_run
from attention_transfer.models.network import load_trained
from attention_transfer.models.start import load_network
from attention_transfer.models.weights import load_weights
from attention_transfer.models.wrn import WideResNet

CLASSES = [f"class{i}" for i in range(10)]
GROUPS = ["group0", "group1", "group2"]
IMAGES = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_same_network(model, expected, x, groups=GROUPS):
    """The module's logits and group outputs against (logits, groups) of the plain evaluation."""
    assert not model.training
    with torch.no_grad():
        logits, features = at.tap(model, groups)(x)
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
    assert list(features) == groups
    for ours, theirs in zip(features.values(), expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def broken(folder, *words):
    """Loading says one line that names the folder, with these words in it."""
    with pytest.raises(at.UserError) as error:
        load_authors_run(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    for word in words:
        assert word in str(error.value)


class TestCifar:
    @pytest.mark.parametrize(
        ("depth", "width", "classes"), [(10, 1, 10), (16, 1, 100), (22, 2, 10), (10, 3, 5)]
    )
    def test_one_network(self, tmp_path, depth, width, classes):
        params, x = wrn_params(depth, width, classes), torch.randn(2, 3, 16, 16)
        run = load_authors_run(write_run(tmp_path / "r", params, num_classes=classes))
        assert isinstance(run.model.network, WideResNet) and run.teacher is None
        assert (run.name, run.num_classes) == (f"wrn-{depth}-{width}", classes)
        assert run.options["lr"] == 0.1
        assert_same_network(run.model.network, wrn(x, params), x)

    def test_a_distillation(self, tmp_path):
        student, teacher, x = wrn_params(10, 1), wrn_params(16, 2), torch.randn(2, 3, 16, 16)
        folder = write_run(
            tmp_path / "r", student, teacher, depth=99, teacher_id="resnet_40_7_teacher"
        )
        run = at.load_authors_run(str(folder))
        assert (run.name, run.teacher_name) == ("wrn-10-1", "wrn-16-2")
        assert_same_network(run.model.network, wrn(x, student), x)
        assert_same_network(run.teacher.network, wrn(x, teacher), x)

    def test_the_legacy_format(self, tmp_path):
        params, x = wrn_params(10, 1), torch.randn(1, 3, 8, 8)
        folder = write_run(tmp_path / "r", params)
        saved = {"params": params, "optimizer": {}, "epoch": 1}
        torch.save(saved, folder / "model.pt7", _use_new_zipfile_serialization=False)
        assert_same_network(load_authors_run(folder).model.network, wrn(x, params), x)

    def test_normalisation_of_the_script(self, tmp_path):
        network = load_trained(write_run(tmp_path / "r", wrn_params(10, 1)))
        x = torch.rand(2, 3, 32, 32)
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
        )
        torch.testing.assert_close(
            network.preprocess(x), (255 * x - mean) / std, rtol=1e-5, atol=1e-5
        )

    def test_images_in_0_to_1(self, tmp_path):
        """Model and teacher normalise as the script did, and say so."""
        student, teacher, x = wrn_params(10, 1), wrn_params(16, 2), torch.rand(2, 3, 32, 32)
        run = load_authors_run(write_run(tmp_path / "r", student, teacher))
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
        )
        for model, params in ((run.model, student), (run.teacher, teacher)):
            expected = wrn((255 * x - mean) / std, params)[0]
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            assert model.class_names == tuple("0123456789") and model.image_size == (32, 32)
            assert "(N, 3, 32, 32), RGB, in [0, 1]" in repr(model)


class TestImageNet:
    @pytest.mark.parametrize(
        ("blocks", "name"),
        [
            ([2, 2, 2, 2], "resnet-18"),
            ([3, 4, 6, 3], "resnet-34"),
            ([3, 4, 6, 5], "resnet-3-4-6-5"),
        ],
    )
    @pytest.mark.parametrize("folded", [False, True])
    def test_one_network(self, tmp_path, blocks, name, folded):
        params, x = resnet_params(blocks, folded=folded), torch.randn(2, 3, 64, 64)
        run = load_authors_run(write_run(tmp_path / "r", params))
        assert run.name == name
        assert_same_network(run.model.network, resnet(x, params), x, [*GROUPS, "group3"])

    def test_a_distillation(self, tmp_path):
        student = resnet_params([2, 2, 2, 2])
        teacher = resnet_params([3, 4, 6, 3], width=6, folded=True)
        run = load_authors_run(write_run(tmp_path / "r", student, teacher))
        x = torch.randn(2, 3, 64, 64)
        assert (run.name, run.teacher_name) == ("resnet-18", "resnet-34")
        assert_same_network(run.model.network, resnet(x, student), x, [*GROUPS, "group3"])
        assert_same_network(run.teacher.network, resnet(x, teacher), x, [*GROUPS, "group3"])
        groups = [f"group{g}" for g in range(4)]
        assert set(zip(groups, groups, strict=True)) <= set(
            at.pair_stages(run.model.network, run.teacher.network, x)
        )

    def test_normalisation_of_the_script(self, tmp_path):
        network = load_trained(write_run(tmp_path / "r", resnet_params([2, 2, 2, 2])))
        assert network.preprocess.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
        assert network.preprocess.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
        assert network.preprocess.size == (224, 224)

    def test_a_missing_tensor(self, tmp_path):
        params = resnet_params([2, 2, 2, 2], folded=True)
        del params["group1.block0.conv_dim.weight"]
        broken(
            write_run(tmp_path / "r", params),
            "resnet-18",
            "1 missing (group1.block0.convdim.weight)",
        )


class TestLog:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_run(tmp_path / "r", wrn_params(10, 1), num_classes=10)

    @pytest.mark.parametrize(
        "text",
        [
            'json_stats: {"depth": 10, "wid',
            'json_stats: {"depth": 10}',
            "json_stats: ",
            'json_stats: [1]\njson_stats: {"depth": 10',
            'parsed options: {}\njson_stats: {"depth": 10, "train_loss": NaN}\n',
        ],
    )
    def test_the_tensors_suffice(self, folder, text):
        (folder / "log.txt").write_text(text)
        run = load_authors_run(folder)
        assert (run.name, run.num_classes) == ("wrn-10-1", 10)
        assert run.options.get("depth") == (10 if "}" in text and "[" not in text else None)

    def test_the_first_line_counts(self, folder):
        (folder / "log.txt").write_text('json_stats: {"beta": 1}\njson_stats: {"beta": 2}\n')
        assert load_authors_run(folder).options == {"beta": 1}

    @pytest.mark.parametrize("text", ["", "epoch 1: 93 %\n"])
    def test_no_statistics(self, folder, text):
        (folder / "log.txt").write_text(text)
        broken(folder, "log.txt has no line json_stats: {...}")

    def test_no_text(self, folder):
        (folder / "log.txt").write_bytes(b"\xff\xfe\x80")
        broken(folder, "log.txt is no text")

    def test_other_classes(self, folder):
        (folder / "log.txt").write_text('json_stats: {"num_classes": 100}\n')
        broken(folder, "has num_classes 100, the tensors of model.pt7 have 10")

    @pytest.mark.parametrize(
        "own", ["{}", "3", '{"classes": ["a"], "mean": [1], "std": [1], "image_size": [8, 8]}']
    )
    def test_our_entry_is_damaged(self, folder, own):
        (folder / "log.txt").write_text(f'json_stats: {{"attention_transfer": {own}}}\n')
        broken(folder, "its attention_transfer entry, is damaged")


class TestDamage:
    def test_missing(self, tmp_path):
        broken(tmp_path / "none", "is not a folder")
        folder = write_run(tmp_path / "r", wrn_params(10, 1))
        (folder / "log.txt").rename(folder / "l")
        broken(folder, "has no log.txt")
        (folder / "l").rename(folder / "log.txt")
        (folder / "model.pt7").unlink()
        broken(folder, "has no model.pt7")

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_cut_short(self, tmp_path, share, zipped):
        folder = write_run(tmp_path / "r", params := wrn_params(10, 1))
        file = folder / "model.pt7"
        torch.save({"params": params}, file, _use_new_zipfile_serialization=zipped)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        broken(folder, "model.pt7")

    def test_a_pickle_is_never_executed(self, tmp_path):
        folder = write_run(tmp_path / "r", params := wrn_params(10, 1))
        proof = tmp_path / "executed"
        for zipped in (True, False):
            saved = {"params": params, "optimizer": Explosive(proof)}
            torch.save(saved, folder / "model.pt7", _use_new_zipfile_serialization=zipped)
            broken(folder, "pickles are not executed here")
        assert not proof.exists()

    @pytest.mark.parametrize("content", [[1], {"epoch": 1}, {"params": {}}, {"params": [1]}])
    def test_no_params(self, tmp_path, content):
        folder = write_run(tmp_path / "r", wrn_params(10, 1))
        torch.save(content, folder / "model.pt7")
        broken(folder, 'holds no "params"')

    @pytest.mark.parametrize(
        ("value", "kind"),
        [(3, "type int"), (torch.zeros(2, dtype=torch.int64), "type torch.int64")],
    )
    def test_values_that_are_no_floating_point_tensors(self, tmp_path, value, kind):
        broken(
            write_run(tmp_path / "r", wrn_params(10, 1) | {"bn.weight": value}),
            "params['bn.weight']",
            kind,
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                lambda p: p.pop("group1.block0.convdim"),
                ["wrn-10-1", "1 missing (group1.block0.convdim.weight)"],
            ),
            (lambda p: p.pop("bn.running_var"), ["1 missing (bn.running_var)"]),
            (lambda p: p.update(extra=torch.zeros(1)), ["1 unexpected (extra)"]),
            (
                lambda p: p.update({"conv0": torch.zeros(16, 1, 3, 3)}),
                ["conv0.weight (16, 1, 3, 3) for (16, 3, 3, 3)"],
            ),
            (lambda p: p.update({"fc.bias": torch.zeros(3)}), ["fc.bias (3,) for (10,)"]),
            (lambda p: p.pop("fc.weight"), ["no fc.weight"]),
            (
                lambda p: p.update({"fc.weight": torch.zeros(())}),
                ["no fc.weight (classes, features)"],
            ),
            (
                lambda p: p.pop("group1.block0.conv0"),
                ["1 missing (group1.block0.conv0.weight)"],
            ),
            (
                lambda p: p.update({"group0.block0.conv0": torch.zeros(4)}),
                ["group0.block0.conv0.weight (4,) for (16, 16, 3, 3)"],
            ),
            (
                lambda p: p.update({"group0.block0.conv0": torch.zeros(17, 16, 3, 3)}),
                ["group0.block0.conv0.weight (17, 16, 3, 3) for (16, 16, 3, 3)"],
            ),
            (
                lambda p: p.update({"group2.block0.conv0": torch.zeros(48, 32, 3, 3)}),
                ["group2.block0.conv0.weight (48, 32, 3, 3) for (64, 32, 3, 3)"],
            ),
            (
                lambda p: p.update({"group2.block1.conv0": torch.zeros(64, 64, 3, 3)}),
                ["taken for wrn-10-1,", "1 unexpected (group2.block1.conv0.weight)"],
            ),
        ],
    )
    def test_no_network(self, tmp_path, change, words):
        params = wrn_params(10, 1)
        change(params)
        broken(write_run(tmp_path / "r", params), "model.pt7", *words)

    def test_a_distillation_with_half_its_names(self, tmp_path):
        student, teacher = wrn_params(10, 1), wrn_params(10, 2)
        named = {f"teacher.{k}": v for k, v in teacher.items()}
        broken(write_run(tmp_path / "a", named), "no tensor of its student")
        broken(
            write_run(
                tmp_path / "b", named | {f"student.{k}": v for k, v in student.items()} | student
            ),
            "neither",
        )
        broken(
            write_run(tmp_path / "c", student, wrn_params(10, 1, 7)),
            "student has 10 classes, its teacher 7",
        )


class TestTeacher:
    def test_a_folder_as_teacher(self, tmp_path):
        params, x = wrn_params(10, 2), torch.randn(2, 3, 16, 16)
        folder = write_run(tmp_path / "r", params)
        network = load_network(str(folder), CLASSES, *IMAGES)
        assert (network.name, network.classes) == ("wrn-10-2", tuple(CLASSES))
        assert network.folder == str(folder)
        digest = hashlib.sha256((folder / "model.pt7").read_bytes()).hexdigest()
        assert network.fingerprint == digest
        assert_same_network(network.module, wrn(x, params), x)

    def test_the_student_of_a_distillation(self, tmp_path):
        folder = write_run(tmp_path / "r", params := wrn_params(10, 1), wrn_params(16, 1))
        x = torch.randn(2, 3, 16, 16)
        assert_same_network(load_network(str(folder), CLASSES, *IMAGES).module, wrn(x, params), x)

    def test_other_classes(self, tmp_path):
        folder = write_run(tmp_path / "r", wrn_params(10, 1))
        with pytest.raises(at.UserError, match="has 10 classes, the data has 9"):
            load_network(str(folder), CLASSES[:9], *IMAGES)
        with pytest.raises(at.UserError, match="leave --teacher-weights out"):
            load_network(str(folder), CLASSES, *IMAGES, "w.pt")

    def test_its_weights_alone(self, tmp_path):
        folder = write_run(tmp_path / "r", params := wrn_params(10, 1), wrn_params(16, 1))
        network, x = at.create_model("wrn-10-1", 10), torch.randn(2, 3, 16, 16)
        load_weights(network, folder / "model.pt7")
        assert_same_network(network.eval(), wrn(x, params), x)
        with pytest.raises(at.UserError, match=re.escape("model.pt7 does not fit WideResNet")):
            load_weights(at.create_model("wrn-16-1", 10), folder / "model.pt7")
        with pytest.raises(at.UserError, match="no weights file"):
            load_weights(network, tmp_path / "model.pt7")
