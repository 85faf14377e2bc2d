#!/usr/bin/env bash
# jax 0.10.2 (with nvidia-cudnn-cu13 9.28.1.4, Python 3.11; 0.11.2 does the same): jax.nn.dot_product_attention with
# implementation="cudnn", compiled ahead for an H100 that is not there, refuses heads of more than 128, as for a card older
# than Hopper. Its limit on Hopper is 256. It asks the first device of the process, not the one that the arguments' sharding
# or a mesh names, and a host without a GPU passes for an old card. All other heads compile.
#
# Valid input: bfloat16 arrays of heads of 256 on a device that target_config describes, an H100. Nothing else is in the way:
# with the question answered by hand, the program compiles to cuDNN's call.
# Seen: 128: compiled; 256: NotImplementedError: The head dim must be <= 128; 256, asked nothing: compiled
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax[cuda13-local]==0.10.2' 'nvidia-cuda-nvcc==13.5.37' 'nvidia-cudnn-cu13==9.28.1.4'
cat > "$folder/compile.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_core_limit: 2048 threads_per_block_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 device_memory_size: 84942979072 memory_bandwidth: 3352320000000
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
(card,) = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices


def attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def outcome(head):
    x = jax.ShapeDtypeStruct((2, 128, 4, head), jnp.bfloat16, sharding=SingleDeviceSharding(card))
    try:
        text = jax.jit(attend).lower(x, x, x).compile().as_text()
    except NotImplementedError as error:
        return f"NotImplementedError: {error}".partition(" and ")[0]
    assert "__cudnn$fmhaSoftmax" in text
    return "compiled"


print(f"128: {outcome(128)}; 256: {outcome(256)}", end="; ")
fused_attention_stablehlo.check_compute_capability = lambda capability: True
print(f"256, asked nothing: {outcome(256)}")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/compile.py" | tee "$folder/out"
grep -qF '128: compiled; 256: NotImplementedError: The head dim must be <= 128; 256, asked nothing: compiled' "$folder/out"
