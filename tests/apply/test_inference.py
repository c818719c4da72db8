"""Size and speed of a network."""

from __future__ import annotations

from small_runs import write_factory

from attention_transfer import create_model
from attention_transfer.apply.inference import InferenceModel, profile
from attention_transfer.models.trained import Preprocess


def test_profile_of_a_network(tmp_path):
    module = create_model(write_factory(tmp_path), 10)
    network = InferenceModel(module, Preprocess((0.5,) * 3, (0.5,) * 3), "fp32")
    numbers = profile(network, (8, 8), batch_size=4)
    assert numbers["parameters"] == 8 * 28 + 8 * 73 + 10 * 9
    assert numbers["flops"] == 2 * (64 * 8 * 27 + 16 * 8 * 72 + 8 * 10)
    assert numbers["inference"]["batch_size"] == 4
    assert numbers["inference"]["images_per_second"] > 0
    assert numbers["inference"]["latency_ms"] > 0
