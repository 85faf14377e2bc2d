"""The cards that can be compiled for."""

import pytest

from sana_jax.measure.gpu_targets import CARDS, target_config


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_described_in_full(name):
    card = CARDS[name]
    text = target_config(card)
    assert text.count("{") == text.count("}") == 3
    assert f'device_description_str: "{card.kind}"' in text and card.kind.startswith("NVIDIA ")
    major, minor = card.capability
    assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
    assert f"device_memory_size: {card.memory_bytes}" in text


def test_peaks():
    """The data sheets' 67 and 19.5 TFLOP/s without tensor cores."""
    assert CARDS["h100"].float32_flops == pytest.approx(66.9e12, rel=0.01)
    assert CARDS["a100"].float32_flops == pytest.approx(19.5e12, rel=0.01)
    card = CARDS["4090"]
    assert card.peak_flops("bf16") == card.peak_flops("f16") == 165.2e12
    assert card.peak_flops("f8e4m3fn") == 2 * card.peak_flops("bf16")
    assert card.peak_flops("f32") == 82.6e12
    assert card.peak_flops("f32", highest=True) == card.float32_flops
