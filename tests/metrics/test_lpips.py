"""LPIPS against torch's own layers, with random weights under the published names."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sana_jax.metrics import lpips
from sana_jax.runtime.errors import UserError
from tests.toy import assert_close, randomise

WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
# The layers of torchvision's `features` after which lpips takes features.
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}


def torch_tower(name):
    """torchvision's `features`, in torch's modules."""
    relu, conv = torch.nn.ReLU, torch.nn.Conv2d
    if name == "alex":
        pool = torch.nn.MaxPool2d(3, 2)
        layers = [conv(3, 64, 11, 4, 2), relu(), pool, conv(64, 192, 5, 1, 2), relu(), pool]
        for c, d in (192, 384), (384, 256), (256, 256):
            layers += [conv(c, d, 3, 1, 1), relu()]
        return torch.nn.Sequential(*layers)
    layers, width = [], 3
    for letter in (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3):
        if letter == "M":
            layers.append(torch.nn.MaxPool2d(2, 2))
        else:
            layers += [conv(width, letter, 3, 1, 1), relu()]
            width = letter
    return torch.nn.Sequential(*layers)


class Twin:
    """The published metric: torchmetrics' formulas on random weights."""

    def __init__(self, name):
        self.tower, self.taps = randomise(torch_tower(name)), TAPS[name]
        generator = torch.Generator().manual_seed(1)
        self.heads = [torch.rand(1, c, 1, 1, generator=generator) for c in WIDTHS[name]]

    def __call__(self, *pair):
        with torch.no_grad():
            return self._distance(*map(torch.from_numpy, pair)).numpy()

    def gradient(self, x, y):
        """Of the distances' sum with respect to x."""
        x = torch.from_numpy(x).requires_grad_()
        return torch.autograd.grad(self._distance(x, torch.from_numpy(y)).sum(), x)[0].numpy()

    def _distance(self, *pair):
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        x, y = ((z.permute(0, 3, 1, 2) - shift) / scale for z in pair)
        total, heads = 0, iter(self.heads)
        for i, layer in enumerate(self.tower):
            x, y = layer(x), layer(y)
            if i in self.taps:
                u, v = (z / torch.sqrt(1e-8 + (z**2).sum(1, keepdim=True)) for z in (x, y))
                total = total + torch.conv2d((u - v) ** 2, next(heads)).mean((2, 3))[:, 0]
        return total

    def torchvision(self):
        tower = {f"features.{k}": v.contiguous() for k, v in self.tower.state_dict().items()}
        return tower | {"classifier.0.bias": torch.zeros(3)}

    def lins(self):
        return {f"lin{k}.model.1.weight": head for k, head in enumerate(self.heads)}

    def package(self):
        """The state dict of lpips.LPIPS, which holds the heads under two names."""
        states = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)} | self.lins()
        states |= {f"lins.{k}.model.1.weight": head for k, head in enumerate(self.heads)}
        for key, value in self.tower.state_dict().items():
            index = int(key.split(".")[0])
            k = next(k for k, tap in enumerate(self.taps) if index <= tap)
            states[f"net.slice{k + 1}.{key}"] = value
        return states


@pytest.fixture(scope="module", params=["vgg", "alex"])
def tower(request):
    return request.param


@pytest.fixture(scope="module")
def twin(tower):
    return Twin(tower)


@pytest.fixture(scope="module")
def weights(twin, tmp_path_factory):
    """A combined file, as .pth."""
    path = tmp_path_factory.mktemp("weights") / "lpips.pth"
    torch.save(OrderedDict(twin.package()), path)
    return path


def images(seed, shape=(2, 36, 44, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def test_agrees_with_torch(tower, twin, weights):
    x = images(0)
    y = x + np.float32(0.1) * images(1)
    ours = jax.jit(lpips.lpips, static_argnames="tower")
    params = lpips.load(tower, weights)
    found, expected = ours(params, x, y, tower=tower), twin(x, y)
    assert_close(found, expected, 1e-5, f"{tower}, {expected}")
    assert np.all(ours(params, x, x, tower=tower) < 1e-12)
    np.testing.assert_allclose(ours(params, y, x, tower=tower), found, rtol=1e-6)


def test_every_published_layout_is_read(tower, twin, weights, tmp_path):
    combined = lpips.load(tower, weights)
    torch.save(twin.lins(), tmp_path / "heads.pth")
    numpy = {name: tensor.numpy() for name, tensor in twin.torchvision().items()}
    save_file(numpy, tmp_path / "tower.safetensors")
    apart = lpips.load(tower, f"{tmp_path / 'tower.safetensors'},{tmp_path / 'heads.pth'}")
    jax.tree.map(np.testing.assert_array_equal, combined, apart)
    only_lins = {k: v for k, v in twin.package().items() if not k.startswith("lin") or "s." in k}
    torch.save(only_lins, tmp_path / "lins.pth")
    jax.tree.map(np.testing.assert_array_equal, combined, lpips.load(tower, tmp_path / "lins.pth"))


def test_what_does_not_fit_is_named(tower, twin, tmp_path):
    path = tmp_path / "bad.pth"

    def complaint(tensors):
        torch.save(tensors, path)
        with pytest.raises(UserError) as caught:
            lpips.load(tower, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "lack features.0.weight" in complaint(twin.lins())
    assert "lack lin0.model.1.weight" in complaint(twin.torchvision())
    good = twin.package()
    assert "net.slice1.0.bias has shape (63,) instead of (64,)" in complaint(
        good | {"net.slice1.0.bias": torch.zeros(63)}
    )
    with pytest.raises(UserError, match="is missing"):
        lpips.load(tower, tmp_path / "none.safetensors")
    nan = good | {"lin2.model.1.weight": good["lin2.model.1.weight"] * torch.nan}
    torch.save(nan, path)
    with pytest.raises(UserError, match="lin2.model.1.weight"):
        lpips.load(tower, path)


def test_the_other_tower_is_refused(tower, weights):
    other = {"vgg": "alex", "alex": "vgg"}[tower]
    with pytest.raises(UserError, match="net.slice1.0.weight has shape|lack"):
        lpips.load(other, weights)


def test_gradients_are_finite_where_features_are_zero(tower, weights):
    if tower == "vgg":
        pytest.skip("the norm is the same, and alex quicker")
    params = lpips.load(tower, weights)
    params["convs"] = {k: (kernel, bias - 1e3) for k, (kernel, bias) in params["convs"].items()}
    gradient = jax.grad(lambda x: lpips.lpips(params, x, images(1), tower=tower).sum())
    assert np.isfinite(jax.jit(gradient)(images(0))).all()


def test_gradient_of_a_compiled_loss_agrees_with_torch(tower, twin, weights):
    """As the trainer takes it: inside jit, where a constant that is traced has no gradient."""
    params, y = lpips.load(tower, weights), images(1)
    x = images(0)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda x: lpips.lpips(params, x, y, tower=tower).sum())(x)

    assert_close(gradient(params, x), twin.gradient(x, y), 1e-4, tower)


def test_bfloat16_is_near(tower, weights):
    params, x, y = lpips.load(tower, weights), images(0), images(1)
    exact = lpips.lpips(params, x, y, tower=tower)
    found = lpips.lpips(params, x, y, tower=tower, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=0.02)


def test_images_that_vanish_are_refused(tower, weights):
    params, smallest = lpips.load(tower, weights), {"vgg": 16, "alex": 31}[tower]
    x = images(0, (1, smallest, 40, 3))
    assert np.isfinite(lpips.lpips(params, x, -x, tower=tower)).all()
    with pytest.raises(ValueError, match=f"{smallest} pixels"):
        lpips.lpips(params, x[:, 1:], x[:, 1:], tower=tower)
