"""Step times reckoned from a table of devices, and the lengths of requests from a command line."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from placement.devices import DEVICES, Device, device, kind_of
from placement.grid import Shape
from placement.lengths import parse_lengths
from placement.roofline import COMPUTES, LAYER_MS, READS, ModelSize, roofline, step_ms

SIZE = ModelSize(
    layer_parameters=10**9,
    active=10**9,
    hidden_size=1000,
    num_layers=10,
    num_heads=10,
    num_kv_heads=5,
    head_size=100,
    vocab_size=10**5,
    tied=True,
    max_tokens=4096,
)
ROUND = Device(tflops=100 / COMPUTES, read_gb_s=1000 / READS, memory_gb=80, link_gb_s=100)
"""It reaches 100 TFLOPS and 1000 GB/s."""
FIXED = 10 * LAYER_MS


def test_a_decode_of_one_takes_the_reading_of_weights_and_kv() -> None:
    kv = 1000 * 2 * 10 * 5 * 100 * 2
    nbytes = 2 * (10**9 + 10**8) + kv
    assert step_ms(Shape((), 1, 1000), SIZE, ROUND, 1, 100) == pytest.approx(nbytes / 1e9 + FIXED)


def test_a_long_prompt_takes_its_arithmetic() -> None:
    layers, attention = 2 * 10**9 * 4000, 4 * 10 * 100 * 10 * (4000 * 4001 / 2)
    head = 2 * 10**8 / 1e9  # of its last token alone, which reads the weights
    assert step_ms(Shape(((0, 4000),)), SIZE, ROUND, 1, 100) == pytest.approx(
        (layers + attention) / 1e11 + head + FIXED
    )


def test_ranks_share_the_work_and_pay_for_their_sums() -> None:
    step = Shape(((0, 2000),))
    alone, two = (step_ms(step, SIZE, ROUND, tp, 100) for tp in (1, 2))
    sums = 10 * 2 * (0.01 + 2000 * 1000 * 2 / 1e8)
    assert two == pytest.approx((alone - FIXED) / 2 + FIXED + sums)


def test_few_tokens_read_few_experts() -> None:
    mixed = ModelSize(**{**vars(SIZE), "active": 10**8})
    one, many = (step_ms(Shape((), batch, 10), mixed, ROUND, 1, 100) for batch in (1, 50))
    assert one == pytest.approx(2 * 10**8 / 1e9 + 2 * 10**8 / 1e9 + FIXED, rel=0.01)
    assert many > 2 * 10**9 / 1e9


@pytest.mark.parametrize("kind", [kind for kind in DEVICES if kind != "cpu"])
def test_every_device_of_the_table_gives_a_profile_that_is_marked_as_a_roofline(kind: str) -> None:
    found = roofline("small", SIZE, kind, 2)
    assert (found.source, found.setting.device, found.setting.tp) == ("roofline", kind, 2)
    assert found.latency.step_ms(1000, 10**6, 0, 0, 0) > 0
    assert found.range.longest <= SIZE.max_tokens
    assert found.model.weight_bytes == 2 * (10**9 + 10**8)


def test_a_faster_device_is_faster() -> None:
    steps = {kind: roofline("small", SIZE, kind).latency.step_ms(2048, 2048**2, 0, 0, 0) for kind in DEVICES}
    assert steps["H100"] < steps["A100"] < steps["RTX4090"] < steps["cpu"]


def test_a_device_goes_by_its_name_in_the_table_or_by_what_a_driver_calls_it() -> None:
    assert device("rtx 4090") is DEVICES["RTX4090"]
    assert kind_of("NVIDIA H100 80GB HBM3") == "H100"
    assert kind_of("NVIDIA GeForce RTX 4090") == "RTX4090"
    assert kind_of("Another One") == "Another One"
    with pytest.raises(ConfigError, match="no device 'H900' in the table: it has A100, H100"):
        device("H900")


def test_lengths_have_the_means_and_the_variation_that_were_asked_for() -> None:
    fixed, varied = parse_lengths("prompt=300, output=40"), parse_lengths("prompt=300,output=40,cv=0.5")
    assert set(fixed.prompt_tokens) == {300}
    assert varied.prompt_tokens.mean() == pytest.approx(300, rel=0.05)
    assert varied.output_tokens.std() / varied.output_tokens.mean() == pytest.approx(0.5, rel=0.1)
    assert varied.gaps.mean() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prompt=300",
        "prompt=300,output=x",
        "prompt=0,output=3",
        "prompt=3,output=3,cv=-1",
        "prompt=3,output=3,cv=1e200",
        "prompt=3,outputs=4",
    ],
)
def test_lengths_that_cannot_be_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--lengths: .*write --lengths prompt=512"):
        parse_lengths(text)
