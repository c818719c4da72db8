"""Pairing stages."""

from __future__ import annotations

import pytest
import torch
from tapped import HEAD, Small, conv, images
from torch import nn

import attention_transfer as at
from attention_transfer.config import make_recipe, named_recipe
from attention_transfer.errors import UserError
from attention_transfer.taps import (
    explain,
    match_stages,
    parse_pairs,
    resolve_pairs,
    unpaired_stages,
)


class TestPairs:
    def test_wrn(self):
        pairs = at.pair_stages(
            at.create_model("wrn-10-1", 10), at.create_model("wrn-16-2", 10), images(32)
        )
        assert pairs == [(f"group{g}", f"group{g}") for g in range(3)]

    def test_equal_strides_join_whatever_the_number_of_stages(self):
        deep = nn.Sequential(
            conv(3, 8), conv(8, 8, stride=2), conv(8, 8, stride=2), conv(8, 16, stride=2), *HEAD
        )
        assert at.pair_stages(Small(), deep, images(32)) == [("one", "0"), ("two", "1")]
        assert at.pair_stages(deep, Small(), images(32)) == [("0", "one"), ("1", "two")]
        resnet = at.create_model("torchvision/resnet18", 10)
        assert at.pair_stages(at.create_model("wrn-10-1", 10), resnet, images(32)) == [
            ("group1", "relu"),
            ("group2", "layer1"),
        ]

    def test_strides_are_rounded_to_octaves(self):
        # Without padding: 30 and 14.
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 16, 3, 2), nn.ReLU()
        unpadded = nn.Sequential(*layers, *HEAD)
        assert at.pair_stages(unpadded, Small(), images(32)) == [("1", "one"), ("3", "two")]

    def test_no_pair_shows_both_tables(self):
        far = nn.Sequential(conv(3, 16, stride=8), *HEAD)
        with pytest.raises(at.UserError) as error:
            at.pair_stages(Small(), far, images(32))
        students = "student: one 4×32×32 (stride 1, depth 1), two 4×16×16 (stride 2, depth 2)"
        for words in (
            students,
            "teacher: 0 16×4×4 (stride 8, depth 1)",
            "--pairs STUDENT_LAYER=TEACHER_LAYER",
            "pairs=[",
        ):
            assert words in str(error.value)

    def test_a_pair_of_examples_for_inputs_of_different_size(self):
        small, large = images(16), images(64)
        assert at.pair_stages(Small(), Small(), (small, large)) == [("one", "one"), ("two", "two")]

    def test_a_layer_is_in_one_pair_and_the_nearest_stride_wins(self):
        """At 40 pixels a ResNet ends in 3×3 and 2×2, strides 13.3 and 20, both nearest to 16."""
        stages = [at.Stage("a", (1, 8, 3, 3), 40 / 3), at.Stage("b", (1, 8, 2, 2), 20.0)]
        assert match_stages(stages, stages) == [("a", "a"), ("b", "b")]
        assert match_stages(stages[1:], stages) == [("b", "b")]
        assert match_stages(stages, stages[:1]) == [("a", "a")]
        assert match_stages(stages, [at.Stage("c", (1, 8, 2, 2), 18.0)]) == [("b", "c")]

    def test_explain(self):
        square, other = at.Stage("a", (1, 8, 14, 14), 16.0), at.Stage("b", (1, 8, 17, 17), 299 / 17)
        assert explain(square, square) == "stride 16 in both"
        assert (
            explain(square, other)
            == "strides 16 and 17.6, both nearest to 16; maps are compared at 14×14"
        )
        tokens = at.Stage("c", (1, 196, 8), 16.0)
        assert tokens.size == (14, 14) and tokens.channels == 8
        assert explain(tokens, square) == "stride 16 in both"

    def test_unpaired_stages(self):
        student = [
            at.Stage("a", (1, 8, 8, 8), 4.0),
            at.Stage("b", (1, 8, 3, 3), 40 / 3),
            at.Stage("c", (1, 8, 2, 2), 20.0),
        ]
        teacher = [at.Stage("d", (1, 8, 16, 16), 2.0), at.Stage("e", (1, 8, 2, 2), 18.0)]
        assert match_stages(student, teacher) == [("c", "e")]
        assert unpaired_stages(student, teacher) == [
            ("student", "a", "the teacher has none of stride 4"),
            ("student", "b", "the teacher's stage of its stride is in a nearer pair"),
            ("teacher", "d", "the student has none of stride 2"),
        ]
        assert unpaired_stages(student, student) == []


class TestParse:
    @pytest.mark.parametrize("text", ["auto", "last1", "last12"])
    def test_automatic_pairs_stay_words(self, text):
        assert parse_pairs(text) == text

    def test_layers_by_name(self):
        assert parse_pairs("a=b, c.d = e") == [("a", "b"), ("c.d", "e")]

    @pytest.mark.parametrize("text", ["", "all", "last", "last0", "a=", "=b", "a=b=c", "a=b,"])
    def test_anything_else_is_refused(self, text):
        with pytest.raises(UserError, match="--pairs is .*expected auto, last2, or STUDENT_LAYER="):
            parse_pairs(text)


class TestImagenetRecipe:
    """Its published result is that of four pairs."""

    @pytest.mark.parametrize("student", ["timm", "torchvision"])
    @pytest.mark.parametrize("teacher", ["timm", "torchvision"])
    def test_the_four_groups_of_the_resnets(self, student, teacher):
        with torch.device("meta"):
            networks = [
                at.create_model(f"{student}/resnet18", 10),
                at.create_model(f"{teacher}/resnet34", 10),
            ]
        x = torch.rand(1, 3, 64, 64, device="meta")
        pairs = resolve_pairs(named_recipe("imagenet")["pairs"], *networks, x, x)
        assert pairs == [(f"layer{g}", f"layer{g}") for g in (1, 2, 3, 4)]

    @pytest.mark.parametrize(("method", "teacher"), [("none", None), ("kd", "t"), ("at+kd", "t")])
    def test_it_suits_every_method(self, method, teacher):
        student = {"command": "distill", "model": "timm/resnet18"}
        recipe = make_recipe(
            named_recipe("imagenet"), student, {"method": method, "teacher": teacher}
        )
        assert recipe.pairs == "last4"
