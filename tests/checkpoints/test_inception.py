"""The file of Inception's weights: what is read, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_jax.checkpoints import inception
from sana_jax.runtime.errors import UserError
from tests import references


@pytest.fixture(scope="module")
def weights():
    return references.inception_weights(1)


def test_a_norm_is_folded_into_its_convolution(weights, tmp_path):
    path = tmp_path / "weights.pth"
    extra = {"AuxLogits.fc.bias": torch.zeros(3), "fc.bias": torch.zeros(7)}
    counters = {"Mixed_7c.branch_pool.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(weights | extra | counters, path, _use_new_zipfile_serialization=False)
    params = inception.load(path)
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, 2, bias=False), torch.nn.BatchNorm2d(32))
    layer[1].eps = 1e-3
    name = "Conv2d_1a_3x3"
    state = {"0.weight": weights[f"{name}.conv.weight"]}
    state |= {f"1.{k}": weights[f"{name}.bn.{k}"] for k in inception.NORM.values()}
    layer.load_state_dict(state, strict=False)
    x = torch.randn(1, 3, 9, 9)
    expected = layer.eval()(x).detach()
    kernel, bias = (torch.from_numpy(params[name][k]) for k in ("kernel", "bias"))
    found = torch.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, tmp_path / "weights.safetensors")
    again = inception.load(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(again[name]["kernel"], params[name]["kernel"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"Mixed_6e.branch7x7_2.conv.weight": None}, "missing Mixed_6e.branch7x7_2.conv.weight"),
        ({"Conv2d_9.conv.weight": torch.ones(1)}, "unexpected Conv2d_9.conv.weight"),
        ({"Conv2d_1a_3x3.bn.bias": torch.ones(3)}, r"bn.bias is \[3\] instead of \[32\]"),
        ({"Conv2d_1a_3x3.bn.running_var": -torch.ones(32)}, "a variance below zero"),
        ({"Conv2d_1a_3x3.bn.bias": torch.full((32,), torch.nan)}, "bn.bias holds NaN or Inf"),
    ],
)
def test_other_weights_are_refused(weights, tmp_path, changes, words):
    tensors = {name: x for name, x in (weights | changes).items() if x is not None}
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words):
        inception.load(tmp_path / "weights.pth")
