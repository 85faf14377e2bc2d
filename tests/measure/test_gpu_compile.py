"""Topologies, what is said without the compiler, and XLA's dump."""

import pytest

from sana_jax.measure import gpu_compile
from sana_jax.measure.gpu_compile import gpu_devices, has_compiler, kernels
from sana_jax.measure.gpu_machine_code import Launched
from sana_jax.runtime.errors import UserError


@pytest.mark.parametrize("topology", ["h100", "h100:", "h100:0", "h100:2x2", "b100:1", "h100:-1"])
def test_an_unknown_topology(topology):
    with pytest.raises(UserError, match="is not CARD:COUNT, such as h100:1 or h100:8, .* a100, "):
        gpu_devices(topology)


def test_more_cards_are_whole_hosts():
    with pytest.raises(UserError, match="more than 8 cards are hosts of so many"):
        gpu_devices("h100:12")


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(gpu_compile, "has_compiler", lambda: False)
    with pytest.raises(UserError, match="the CUDA compiler is not installed: pip install -e"):
        gpu_devices("h100:1")
    monkeypatch.setattr(gpu_compile, "has_compiler", lambda: True)
    monkeypatch.setattr(gpu_compile, "tool", lambda name: name == "ptxas" or None)
    with pytest.raises(UserError, match="nvdisasm is not installed: pip install -e"):
        gpu_devices("h100:1")


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="the CUDA compiler is not installed")
@pytest.mark.parametrize("topology, count", [("h100:1", 1), ("a100:8", 8), ("l40s:16", 16)])
def test_devices(topology, count):
    card, devices = gpu_devices(topology)
    assert len(devices) == count and {device.device_kind for device in devices} == {card.kind}


SEQUENCE = """\
001: kCopy           [source       | next=002 (1)] kCopy
002: kWhile          [prev=001 (1) | sink        ]
condition:
    003: kCustomKernel [source | sink] less grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    004: kCustomKernel   [source       | next=005 (1)] state grid: [4, 2, 1] threads: [128, 1, 1]  shared_memory: 4096 bytes
    005: kCublasLtMatmul [prev=004 (1) | sink        ] kCublasLtMatmul
"""  # noqa: E501


def test_kernels_are_found_by_the_instruction_that_launches_them(tmp_path):
    names = {1: "copy.3", 3: "compare", 4: "pallas_call.6", 5: "custom-call.13"}
    thunks = (
        f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
        f"    thunk_id: {number}\n  }}\n}}\n"
        for number, name in names.items()
    )
    (tmp_path / "module_0001.jit_f.thunk_metadata.txt").write_text("".join(thunks))
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(SEQUENCE)
    (tmp_path / "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt").write_text("other")
    for i, entry in enumerate(["less", "state"]):
        (tmp_path / f"module_0001.jit_f.{i}.ptx").write_text(f".visible .entry {entry}(\n")
    found = kernels(tmp_path)
    assert found.keys() == {"compare", "pallas_call.6"}
    assert found["pallas_call.6"] == (".visible .entry state(\n", Launched(8, 128, 4096))
