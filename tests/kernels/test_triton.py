"""The compiler of the kernels for GPU: its warning, and JAX without it."""

import re
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "sana_jax/kernels"

USING = "glumbconv", "linear_attention"

WITHOUT = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # as if JAX had dropped it
import jax
import jax.numpy as jnp
from sana_jax.kernels import triton
from sana_jax.kernels.glumbconv import api
from sana_jax.kernels.linear_attention import linear_attention

assert not triton.AVAILABLE
middle = api.glumbconv
weights = jnp.ones(64), jnp.ones((3, 3, 64)), jnp.ones(64)
operations = [
    (lambda x: linear_attention(x, 32, implementation="pallas"), jnp.ones((1, 64, 192))),
    (
        lambda x: middle(x, jnp.ones((32, 64)), weights, jnp.eye(32), implementation="pallas"),
        jnp.ones((1, 8, 8, 32)),
    ),
]
for fn, x in operations:
    text = jax.jit(fn).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in text and "dot_general" in text
    plain = jax.jit(fn)(x)  # on the CPU
"""

WARNING = """
import warnings
import jax
import jax.numpy as jnp
from tests.kernels.helpers import operations
from jax.sharding import AbstractDevice, AbstractMesh

device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
fn, args = operations()["linear_attention"]
warnings.simplefilter("default", append=True)
with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
warnings.warn("another is deprecated", DeprecationWarning)
"""


def run(script):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_without_it_the_operations_take_their_plain_form():
    run(WITHOUT)


def test_its_deprecation_is_silent_and_no_other():
    told = run(WARNING)
    assert "Triton" not in told and "another is deprecated" in told


def test_only_the_kernels_for_gpu_know_it():
    sources = {path: path.read_text() for path in KERNELS.parent.rglob("*.py")}
    imports = re.compile(r"pallas(\.| import )triton\b")
    importing = {path for path, text in sources.items() if imports.search(text)}
    using = {path for path, text in sources.items() if "plgpu" in text}
    assert importing == {KERNELS / "triton.py"}
    assert using == importing | {KERNELS / name / "gpu.py" for name in USING}
