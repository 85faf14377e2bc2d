#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1 (Python 3.11): a scan that stacks its results gets an uninitialised buffer for them on a
# TPU, since the loop overwrites all of it; the same scan in reverse fills the stack with zeros first. Every gradient of a
# scan over stacked weights runs in reverse, so a training writes its gradients' stacks once more than it needs.
#
# Valid input: jax.lax.scan with and without reverse=True, compiled for a v5e that is not there. It needs no TPU.
# Seen: forward AllocateBuffer; reversed broadcast; gradient of the weights broadcast
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
cat > "$folder/compile.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

chip, *_ = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
here = SingleDeviceSharding(chip)
x = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16, sharding=here)
weights = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16, sharding=here)


def start(function, stack):
    """Says how the stack that a program returns begins."""
    text = jax.jit(function).lower(x, weights).compile().as_text()
    made = re.findall(
        rf'= bf16\[{stack}\]\S* (?:(broadcast)\(|custom-call\(\), custom_call_target="(Alloc\w+)")', text
    )
    return " ".join(sorted({first or second for first, second in made}))


def layers(x, weights, reverse=False):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w),) * 2, x, weights, reverse=reverse)


def gradient(x, weights):
    def loss(weights):
        return jnp.sum(layers(x, weights)[0].astype(jnp.float32))

    return jax.grad(loss)(weights)


print("forward", start(layers, "8,2048,1024"), end="; ")
print("reversed", start(lambda *args: layers(*args, reverse=True), "8,2048,1024"), end="; ")
print("gradient of the weights", start(gradient, "8,1024,1024"))
PYTHON
TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/compile.py" | tee "$folder/out"
grep -qF 'forward AllocateBuffer; reversed broadcast; gradient of the weights broadcast' "$folder/out"
