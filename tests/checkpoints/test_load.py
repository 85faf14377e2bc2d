"""Opening a checkpoint by its name: its dtype, its instruction and the warnings about it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_jax.checkpoints import native
from sana_jax.runtime.errors import UserError
from sana_jax.text import instruction
from tests.checkpoints.folders import load_on_one_device


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(written, folder, stored, dtype):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.to(stored) for n, t in load_file(path).items()}, path)
    found = load_on_one_device(folder, dtype).params["dit"]["proj_out"]["kernel"]
    exact = load_file(path)["proj_out.weight"].float().numpy().T
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), exact.astype(jnp.dtype(dtype)))


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="native folder, a diffusers folder, a bundled name"):
        load_on_one_device("no_such_model")
    with pytest.raises(UserError, match="neither model.json"):
        load_on_one_device(tmp_path)
    with pytest.raises(UserError, match="some/model is no folder here"):
        load_on_one_device("some/model")  # tests are offline


def test_instruction_of_a_diffusers_folder(written, tmp_path, monkeypatch, caplog):
    """From the file given, else from the installed diffusers; without either one line says so."""
    assert load_on_one_device(written).instruction.source.startswith("diffusers/")
    file = tmp_path / "instruction.txt"
    file.write_text("draw: ")
    assert load_on_one_device(written, instruction_file=str(file)).instruction.text == "draw: "
    monkeypatch.setattr(instruction, "_diffusers_instruction", lambda: None)
    with caplog.at_level("WARNING"):
        assert load_on_one_device(written).instruction is None
    (line,) = [r.getMessage() for r in caplog.records if "instruction" in r.getMessage()]
    assert "--instruction_file" in line and "\n" not in line


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("Sana_600M_1024px_diffusers", {}, True),
        ("Sana_600M_1024px_diffusers", {"dtype": "float16"}, False),
        ("models--org--Sana_1600M_512px_MultiLing_diffusers/snapshots/0123abc", {}, True),
        ("Sana_600M_1024px_diffusers", {"clip_attention": True}, False),
        ("Sana_1600M_1024px_BF16_diffusers", {}, False),
        ("SANA1.5_1.6B_1024px_diffusers", {}, False),
    ],
)
def test_weights_trained_in_float16_are_told_of(written, tmp_path, caplog, name, options, told):
    """Of a folder that was converted too, which has another name."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).symlink_to(written)
    found = load_on_one_device(tmp_path / name, **options)
    assert ("was trained in float16" in caplog.text) == told
    caplog.clear()
    native.save(found, tmp_path / "native")
    load_on_one_device(tmp_path / "native", options.get("dtype", "float32"))
    assert ("was trained in float16" in caplog.text) == told
