"""Recipes: checked words, layers of options, named files, what each method gets."""

from __future__ import annotations

import math
import re

import pytest
import yaml

from attention_transfer.config import (
    Recipe,
    make_recipe,
    named_recipe,
    read_recipe,
    recipe_from_flags,
    recipe_names,
)
from attention_transfer.errors import UserError
from attention_transfer.map_options import LossOptions
from attention_transfer.methods.registry import create_methods

KEYS = tuple(Recipe().to_dict())
DISTILL = {"command": "distill", "model": "wrn-10-1", "teacher": "runs/teacher", "method": "at+kd"}


def methods(**options):
    recipe = make_recipe(DISTILL, options)
    return {m.name: m for m in create_methods(recipe)}


class TestWords:
    @pytest.mark.parametrize(
        ("key", "nearest"),
        [("epoch", "epochs"), ("batchsize", "batch_size"), ("weight-decy", "weight_decay")],
    )
    def test_an_unknown_key(self, key, nearest):
        with pytest.raises(UserError, match=f"unknown option .*did you mean {nearest}"):
            make_recipe(DISTILL, {key: 1})

    def test_dashes_and_underscores_are_the_same(self):
        assert make_recipe(DISTILL, {"batch-size": 8}, {"weight_decay": 0}).batch_size == 8
        assert make_recipe(DISTILL, {"batch-size": 8}, {"batch_size": 9}).batch_size == 9

    @pytest.mark.parametrize(
        ("key", "value", "nearest"),
        [
            ("schedule", "steps", "step"),
            ("device", "gpu", ""),
            ("precision", "fp16", "fp32"),
            ("method", "at+kdd", ""),
            ("kind", "summ", "sum"),
            ("convention", "author", "authors"),
            ("resize", "feature", "features"),
            ("decay", "linaer", "linear"),
            ("compile", "onn", "on"),
            ("command", "distil", "distill"),
        ],
    )
    def test_an_unknown_value(self, key, value, nearest):
        with pytest.raises(UserError, match=f"{value.rpartition('+')[2]}'.*expected .*{nearest}"):
            make_recipe(DISTILL, {key: value})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("epochs", 0),
            ("epochs", 1.5),
            ("epochs", "ten"),
            ("epochs", True),
            ("epochs", None),
            ("batch_size", 0),
            ("max_steps", 0),
            ("limit_train", -1),
            ("devices", 0),
            ("image_size", 0),
            ("seed", 1.0),
            ("seed", None),
            ("lr", 0),
            ("lr", -1),
            ("lr", math.nan),
            ("lr", math.inf),
            ("lr", "fast"),
            ("lr", None),
            ("weight_decay", -1),
            ("momentum", -0.1),
            ("momentum", 0),
            ("nesterov", "yes"),
            ("nesterov", 1),
            ("flip", None),
            ("milestones", "60,x"),
            ("milestones", [60, 1.5]),
            ("milestones", None),
            ("crop_padding", -1),
            ("crop_padding", "four"),
            ("alpha", 1.5),
            ("temperature", 0),
            ("p", 0.5),
            ("norm", 0.5),
            ("beta", -1),
            ("beta", "much"),
            ("beta", {"at": math.nan}),
            ("method", 5),
            ("model", 5),
            ("model", ""),
            ("data", None),
            ("pairs", "group0"),
            ("pairs", "a="),
            ("pairs", [["a", "b"]]),
        ],
    )
    def test_a_wrong_value(self, key, value):
        with pytest.raises(UserError):
            make_recipe(DISTILL, {key: value})

    @pytest.mark.parametrize("key", ["lr", "weight_decay", "p", "temperature"])
    @pytest.mark.parametrize(("text", "value"), [("5e-4", 5e-4), ("1e0", 1.0)])
    def test_what_yaml_reads_as_a_word(self, key, text, value):
        assert yaml.safe_load(f"x: {text}")["x"] == text
        if key in ("p",) and value < 1:
            return
        assert getattr(make_recipe(DISTILL, {key: text}), key) == value

    def test_beta_as_yaml_reads_it(self):
        read = yaml.safe_load("a: 1e3\nb: {at: 1e3}\nc: at=1000\nd: 100")
        assert [make_recipe(DISTILL, {"beta": read[k]}).beta for k in "abcd"] == [
            1000.0,
            {"at": 1000.0},
            {"at": 1000.0},
            100,
        ]

    def test_on_and_off_as_yaml_reads_them(self):
        assert [
            make_recipe(DISTILL, yaml.safe_load(f"compile: {w}")).compile
            for w in ("on", "off", "auto")
        ] == [
            "on",
            "off",
            "auto",
        ]

    def test_whole_numbers_become_floats(self):
        lr = make_recipe(DISTILL, {"lr": 1}).lr
        assert lr == 1.0 and isinstance(lr, float)

    def test_a_teacher_is_asked_for_and_train_takes_none(self):
        for method in ("at", "kd", "at+kd"):
            with pytest.raises(UserError, match="needs --teacher"):
                make_recipe(DISTILL, {"method": method, "teacher": None})
        assert make_recipe(DISTILL, {"method": "none", "teacher": None}).method == "none"
        for words in ({"method": "at", "teacher": "t"}, {"teacher": "t"}):
            with pytest.raises(UserError, match="train takes one network only"):
                make_recipe({"model": "wrn-10-1"}, words)

    def test_the_default_method_learns_from_the_teacher(self):
        given = {"command": "distill", "model": "wrn-10-1"}
        recipe = make_recipe(given, {"teacher": "t"})
        assert recipe.method == recipe.to_dict()["method"] == "at+kd"
        assert make_recipe(given).method == "none"
        assert make_recipe(given, {"teacher": "t", "method": None}).method == "at+kd"
        assert make_recipe({"model": "wrn-10-1"}).method == "none"

    @pytest.mark.parametrize("method", ["none", "symmetry", "min-l2", "symmetry+min-l2"])
    def test_a_teacher_that_no_method_uses_is_refused(self, method):
        words = f"--teacher is given, but method '{re.escape(method)}' uses none.*such as at.kd"
        with pytest.raises(UserError, match=words):
            make_recipe(DISTILL, {"method": method})

    def test_a_forgotten_teacher(self):
        given = {"command": "distill", "model": "wrn-10-1"}
        words = "--alpha is given, but method 'none' has no alpha: leave it out, or give --teacher"
        with pytest.raises(UserError, match=words):
            make_recipe(given, {"alpha": 0.5})

    def test_nesterov_needs_momentum(self):
        assert make_recipe(DISTILL, {"momentum": 0, "nesterov": False}).momentum == 0


class TestLayers:
    def test_later_ones_win(self):
        recipe = make_recipe(DISTILL, {"lr": 0.1, "epochs": 3}, {"lr": 0.2}, {})
        assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.2, 3, Recipe().batch_size)

    @pytest.mark.parametrize("name", recipe_names())
    def test_named_recipes(self, name):
        options = named_recipe(name)
        assert set(options) <= set(KEYS)
        for base in ({"model": "wrn-10-1"}, DISTILL):
            recipe = make_recipe(base, options)
            assert all(
                getattr(recipe, k) == (tuple(v) if isinstance(v, list) else v)
                for k, v in options.items()
            )

    def test_the_papers_recipe(self):
        recipe = make_recipe(named_recipe("cifar10-paper"), {"model": "wrn-16-1"})
        assert (recipe.batch_size, recipe.epochs, recipe.lr, recipe.lr_decay) == (
            128,
            200,
            0.1,
            0.2,
        )
        assert (recipe.momentum, recipe.weight_decay, recipe.nesterov) == (0.9, 5e-4, False)
        assert (recipe.schedule, recipe.milestones, recipe.crop_padding, recipe.flip) == (
            "step",
            (60, 120, 160),
            4,
            True,
        )

    def test_an_unknown_recipe(self):
        with pytest.raises(UserError, match="did you mean cifar10-paper"):
            named_recipe("cifar10-papr")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "NoneType"),
            (b"- a", "list"),
            (b"a: [", "not YAML"),
            (b"\xff\xfe\x00", "not YAML"),
            (b"!!python/object:os.x {}", "not YAML"),
        ],
    )
    def test_files_that_are_none(self, tmp_path, content, words):
        (tmp_path / "r.yaml").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_recipe(tmp_path / "r.yaml")

    def test_no_file(self, tmp_path):
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(UserError, match="cannot read the recipe"):
                read_recipe(path)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"beta": {"at": 10.0}, "decay": {"at": "step"}},
            {"beta": "at=5", "milestones": [1, 2], "norm": math.inf, "convention": "paper"},
            {"pairs": "a=b, c=d"},
        ],
    )
    def test_round_trip_through_yaml(self, options):
        recipe = make_recipe(DISTILL, options)
        again = make_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict(), sort_keys=False)))
        assert again == recipe and again.to_dict() == recipe.to_dict()
        assert list(recipe.to_dict()) == list(KEYS)

    def test_identity_is_what_changes_numbers(self):
        base = make_recipe(DISTILL).identity()
        for how in (
            {"device": "cpu"},
            {"precision": "bf16"},
            {"compile": "on"},
            {"devices": 2},
            {"nodes": 2},
        ):
            assert make_recipe(DISTILL, how).identity() == base
        for what in (
            {"seed": 1},
            {"beta": 10},
            {"epochs": 3},
            {"milestones": [1]},
            {"method": "at"},
            {"limit_train": 5},
        ):
            assert make_recipe(DISTILL, what).identity() != base


class TestMethods:
    def test_defaults(self):
        both = methods()
        assert both["at"].is_auto and (both["kd"].alpha, both["kd"].temperature) == (0.9, 4.0)

    def test_attention_transfer_decays_beside_distillation_alone(self):
        assert methods()["at"].decay == "linear"
        assert methods(method="kd+at")["at"].decay == "linear"
        assert methods(method="at")["at"].decay == "constant"
        assert methods(decay="constant")["at"].decay == "constant"
        assert methods(decay={"at": "step"})["at"].decay == "step"
        assert methods(method="at", decay="cosine")["at"].decay == "cosine"

    def test_beta_for_all_or_for_one(self):
        assert methods(beta=10)["at"].beta == 10
        assert methods(beta="at=1000")["at"].beta == 1000
        assert methods(beta={"at": 0})["at"].beta == 0
        with pytest.raises(
            UserError, match="--beta names 'kd', but method 'at.kd' has at with a beta"
        ):
            methods(beta={"kd": 1})
        with pytest.raises(UserError, match="--beta names 'symmetry'"):
            methods(beta="at=1000,symmetry=1")
        with pytest.raises(
            UserError, match="--decay names 'at', but method 'kd' has kd with a decay"
        ):
            methods(method="kd", decay={"at": "linear"})

    def test_a_plain_decay_is_that_of_beta(self):
        assert {n: m.decay for n, m in methods(decay="step").items()} == {
            "at": "step",
            "kd": "constant",
        }
        assert methods(method="kd", decay="cosine")["kd"].decay == "cosine"
        assert {n: m.decay for n, m in methods(decay="kd=warm-up").items()} == {
            "at": "linear",
            "kd": "warm-up",
        }

    def test_options_of_the_gradient_methods(self):
        found = methods(
            method="gradient+symmetry+min-l2", squared=False, beta="gradient=2,symmetry=3,min-l2=4"
        )
        assert {n: m.beta for n, m in found.items()} == {"gradient": 2, "symmetry": 3, "min-l2": 4}
        assert not found["gradient"].squared and not found["symmetry"].squared
        with pytest.raises(UserError, match="--squared is given, but method 'at' has no squared"):
            methods(method="at", squared=False)

    def test_one_beta_for_methods_of_other_scales_is_refused(self):
        with pytest.raises(
            UserError,
            match="--beta 1000 could mean at or symmetry.*give --beta at=NUMBER,symmetry=NUMBER",
        ):
            methods(method="at+symmetry", beta=1000.0)
        assert methods(method="at+symmetry", beta="at=1000,symmetry=1")["symmetry"].beta == 1
        assert methods(method="at+kd", beta=1000.0)["at"].beta == 1000

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "kd", "pairs": "a=b"}, "--pairs is given, but method 'kd' reads no layers"),
            ({"method": "at", "norm": 3}, "--norm is given, but --convention authors has none"),
            (
                {"method": "at", "kind": "attention", "p": 4},
                "--p is given, but --kind attention has",
            ),
            (
                {"method": "at", "axis": "channel", "resize": "bilinear"},
                r"--resize is given, but maps over channels",
            ),
            (
                {"method": "min-l2", "teacher_weights": "w.pt"},
                "--teacher is given, but method 'min-l2' uses none: leave --teacher out",
            ),
            (
                {"method": "min-l2", "teacher": None, "teacher_weights": "w.pt"},
                "--teacher-weights is given without --teacher",
            ),
            ({"method": "at", "momentum": 0}, "nesterov needs momentum above 0.*--no-nesterov"),
        ],
    )
    def test_an_option_that_would_do_nothing_is_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            make_recipe(DISTILL, options)

    def test_what_belongs_together(self):
        assert (
            make_recipe(DISTILL, {"method": "kd", "pairs": "last2"}).pairs == "last2"
        )  # as the recipe has it
        assert make_recipe(DISTILL, {"method": "at", "norm": 3, "convention": "paper"}).norm == 3
        assert (
            make_recipe(DISTILL, {"method": "at", "optimizer": "adamw", "momentum": 0}).momentum
            == 0
        )

    def test_weights_of_the_pairs(self):
        assert (
            methods(weights="1,0.5,2")["at"].pair_weights
            == methods(weights=[1, 0.5, 2])["at"].pair_weights
        )
        assert methods(weights="1,0.5,2")["at"].pair_weights == [1, 0.5, 2]
        with pytest.raises(UserError, match="weights is '1,x': expected a number for each pair"):
            methods(weights="1,x")

    def test_options_reach_their_method(self):
        at = methods(
            kind="max", p=3, norm=1, convention="paper", resize="bilinear", alpha=0.5, temperature=2
        )
        assert at["at"].options == LossOptions(
            kind="max", p=3.0, convention="paper", resize="bilinear", norm=1.0
        )
        assert (at["kd"].alpha, at["kd"].temperature) == (0.5, 2.0)

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("beta", "1000", 1000.0),
            ("beta", "1e3", 1000.0),
            ("beta", "at=1000", {"at": 1000.0}),
            ("decay", "linear", "linear"),
            ("decay", "at=linear, kd=cosine", {"at": "linear", "kd": "cosine"}),
        ],
    )
    def test_a_value_for_each_method(self, key, text, value):
        assert getattr(make_recipe(DISTILL, {key: text}), key) == value

    @pytest.mark.parametrize("text", ["", "much", "at=much", "at=1000,5", "at="])
    def test_a_beta_that_is_none(self, text):
        with pytest.raises(UserError, match="beta is .*expected a number, auto, or METHOD=NUMBER"):
            make_recipe(DISTILL, {"beta": text})


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("kd", {"p": 4}),
        ("kd", {"teacher-kind": "attention"}),
        ("at", {"alpha": 0.5}),
        ("none", {"resize": "features"}),
    ],
)
def test_an_option_of_a_method_that_is_not_used_is_an_error(method, option):
    flag = next(iter(option))
    words = f"--{flag} is given, but method '{method}' has no {flag}: leave it out"
    with pytest.raises(UserError, match=words):
        make_recipe(DISTILL, {"method": method}, option)


class TestFlags:
    """What a person types has an effect, or is refused."""

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"method": "kd", "pairs": "last9"}, "--pairs is given, but method 'kd' reads no lay"),
            ({"method": "kd", "pairs": "auto"}, "--pairs is given, but method 'kd' reads no lay"),
            ({"method": "at", "temperature": 4.0}, "--temperature is given, but method 'at' has"),
            ({"milestones": "1"}, "--milestones is given, but --schedule one-cycle has none"),
            ({"optimizer": "adamw", "nesterov": True}, "--nesterov is given, but --optimizer adam"),
        ],
    )
    def test_a_flag_that_does_nothing(self, flags, message):
        with pytest.raises(UserError, match=message):
            recipe_from_flags("distill", None, None, DISTILL | flags)

    def test_a_recipe_may_hold_them(self, tmp_path):
        file = tmp_path / "r.yaml"
        file.write_text("pairs: last2\nmilestones: [3]\nnesterov: true\n")
        flags = DISTILL | {"method": "kd", "optimizer": "adamw"}
        assert recipe_from_flags("distill", None, file, flags).milestones == (3,)

    @pytest.mark.parametrize(
        ("recipe", "flags", "flip"),
        [
            ("cifar10-short", {}, True),
            ("cifar10-short", {"data": "digits"}, False),
            ("cifar10-short", {"data": "digits", "flip": True}, True),
            ("digits-student", {}, False),
            (None, {"data": "digits"}, False),
            (None, {"data": "cifar10"}, True),
        ],
    )
    def test_the_data_brings_its_defaults(self, recipe, flags, flip):
        flags = {"model": "wrn-10-1"} | flags
        assert recipe_from_flags("train", recipe, None, flags).flip is flip

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"milestones": "-1"}, r"milestones is -1: expected epochs from 1 up"),
            ({"milestones": "60,0"}, r"milestones is '60,0': expected epochs from 1 up"),
            ({"epochs": "9" * 400}, r"epochs is 9+: expected a whole number ≥ 1, below 2\^63"),
            ({"epochs": 10**400}, r"epochs is a number of over 300 digits: .* below 2\^63"),
            ({"data": "folder:a\0b"}, r"data is 'folder:a\\x00b': expected text without"),
        ],
    )
    def test_values_that_no_run_can_have(self, options, message):
        with pytest.raises(UserError, match=message):
            make_recipe({"model": "wrn-10-1"}, options)

    def test_a_method_stands_once(self):
        with pytest.raises(UserError, match="beta is 'at=1,at=2': expected"):
            make_recipe(DISTILL, {"method": "at", "beta": "at=1,at=2"})

    @pytest.mark.parametrize("text", ["lr: 1\nlr: 2\n", "beta: {at: 1, at: 2}\n"])
    def test_a_key_stands_once(self, tmp_path, text):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(
            UserError, match=r"r\.yaml is not YAML: the key .(lr|at). is given twice"
        ):
            read_recipe(tmp_path / "r.yaml")

    @pytest.mark.parametrize("text", ["teacher: 7", "teacher: [a]", "teacher: {a: 1}"])
    def test_a_teacher_that_is_no_text(self, tmp_path, text):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match="teacher is "):
            recipe_from_flags("distill", None, tmp_path / "r.yaml", {"model": "wrn-10-1"})

    def test_deep_yaml(self, tmp_path):
        (tmp_path / "r.yaml").write_text("a: " + "[" * 100_000)
        with pytest.raises(UserError, match=r"r\.yaml is not YAML"):
            read_recipe(tmp_path / "r.yaml")
