"""The options of the benches: defaults, checks."""

import pytest

from attention_transfer.bench import NAMES, BenchOptions, bench_options
from attention_transfer.bench.options import DEFAULTS, UNREAD
from attention_transfer.errors import UserError


def test_each_bench_has_its_defaults():
    assert UNREAD.keys() <= vars(BenchOptions()).keys()
    assert bench_options("step", {}) == BenchOptions()
    assert bench_options("step", {"rounds": "3", "steps": None}) == BenchOptions(rounds=3)
    assert bench_options("compile", {"rounds": 2}) == BenchOptions(
        batch_size=64, rounds=2, steps=600
    )
    assert bench_options("gradient", {}).student == "nin-thin-no-bn"
    assert DEFAULTS.keys() <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("stepp", {}, "unknown bench 'stepp': expected one of step, .*; did you mean step"),
        ("step", {"data": "photos"}, "--data is given, but bench step .* read it: data"),
        ("loss", {"images": 64}, "--images is given, but bench loss .* read it: epoch, data, com"),
        ("epoch", {"steps": 3}, "--steps is given, but bench epoch does not read it"),
        ("compile", {"compile": "off"}, "--compile is given, but bench compile does not read it"),
        ("step", {"student": "nin-thin"}, "--student is 'nin-thin': .* wrn-DEPTH-WIDTH only"),
        ("loss", {"rounds": 0}, "rounds is 0: expected a whole number ≥ 1"),
        ("loss", {"compile": "graphs"}, "compile is 'graphs': expected one of on, off"),
    ],
)
def test_wrong_options_are_refused(name, given, message):
    with pytest.raises(UserError, match=message):
        bench_options(name, given)
