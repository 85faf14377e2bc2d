"""The packages that the field measures pictures with, as tests import them.

pytorch-fid, clean-fid and torch-fidelity need torchvision, whose wheel on PyPI fits no CPU build of
torch and then breaks the import of diffusers. They are installed without it (tests/references.txt),
and find a stand-in here while they are imported: names that no test calls, and the blocks of
Inception-v3, for which torch-fidelity's own stand.
"""

import contextlib
import sys
import types
from collections.abc import Iterator

import numpy as np
import torch


def _module(name: str, **names) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    return module


def to_tensor(image) -> torch.Tensor:
    """Does what torchvision's ToTensor does: channels first, and 8 bits in 0 .. 1."""
    array = np.array(image)
    planes = torch.from_numpy(array).permute(2, 0, 1).contiguous().float()
    return planes.div(255) if array.dtype == np.uint8 else planes


@contextlib.contextmanager
def stand_in() -> Iterator[types.ModuleType]:
    """Puts a torchvision in place for the block."""
    nothing = type("Nothing", (), {})
    datasets = _module("datasets", **dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), nothing))
    functional = _module("functional")
    transforms = _module("transforms", functional=functional, ToTensor=lambda: to_tensor)
    inception = _module("inception")
    models = _module("models", inception=inception)
    package = _module("torchvision", __version__="0.28.0", datasets=datasets)
    package.transforms, package.models = transforms, models
    modules = {
        "torchvision": package,
        "torchvision.datasets": datasets,
        "torchvision.models": models,
        "torchvision.models.inception": inception,
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield package
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with stand_in() as torchvision:
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_kid
    import torch_fidelity.metric_prc
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    blocks = torchvision.models.inception
    blocks.InceptionA, blocks.InceptionC = fidelity.InceptionA, fidelity.InceptionC
    blocks.InceptionE = fidelity.InceptionE_1
    from cleanfid import fid as clean_fid  # noqa: F401
    from cleanfid import resize as clean_resize  # noqa: F401
    from pytorch_fid import fid_score as pytorch_fid  # noqa: F401
    from pytorch_fid import inception as pytorch_inception

metric_fid = torch_fidelity.metric_fid
metric_kid = torch_fidelity.metric_kid
metric_prc = torch_fidelity.metric_prc


def inception_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random weights under the published names; no batch norm is the identity."""
    from sana_jax.checkpoints.inception import abstract_params

    draw = torch.Generator().manual_seed(seed)
    tensors = {"fc.weight": torch.randn(1008, 2048, generator=draw), "fc.bias": torch.zeros(1008)}
    for path, (height, width, channels, features) in abstract_params().items():
        name, fan_in = path.replace("/", "."), height * width * channels
        kernel = torch.randn(features, channels, height, width, generator=draw)
        uniform = torch.rand(2, features, generator=draw)
        normal = torch.randn(2, features, generator=draw)
        tensors[f"{name}.conv.weight"] = kernel * (2 / fan_in) ** 0.5
        tensors[f"{name}.bn.weight"], tensors[f"{name}.bn.running_var"] = uniform + 0.5
        tensors[f"{name}.bn.bias"], tensors[f"{name}.bn.running_mean"] = normal * 0.2
    return tensors


def fidelity_inception(path) -> torch.nn.Module:
    """Returns torch-fidelity's network with the weights of a .pth file."""
    return fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
    )


def publish(path) -> None:
    """Lets pytorch-fid find the weights of a .pth file where it would download its own."""
    torchvision.models.inception_v3 = lambda **options: fidelity_inception(path)
    pytorch_inception.load_state_dict_from_url = lambda url, **options: torch.load(path)


def pytorch_fid_inception(path, **options) -> torch.nn.Module:
    """Returns pytorch-fid's network with the weights of a .pth file: its blocks, in its order."""
    publish(path)
    return pytorch_inception.InceptionV3([3], **options).eval()
