#!/usr/bin/env bash
# jax 0.10.2 (with nvidia-cuda-nvcc 13.5.37, Python 3.11): compiled ahead for a GPU that is not there, a matrix product gets
# the smallest tile of XLA's Triton kernel, 16 x 8 with two warps, whatever its size, and nothing says so. On a card the
# autotuner chooses. Without one the executable is complete and can be serialised, but was never meant to be run.
#
# Valid input: a product of 2048 x 2048 matrices in bfloat16, for a topology that target_config describes (an H100). It
# needs no GPU and no driver. Nor is a program refused that does not fit: one of three arrays of 40 GB compiles for a
# card of 85, with a line in the log about "an error in the calculation".
# Seen: warps 2 tile [16, 8]; 120 GB compiled for a card of 85
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax[cuda13-local]==0.10.2' 'nvidia-cuda-nvcc==13.5.37'
cat > "$folder/compile.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
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


def compiled(function, *shapes, dtype):
    here = SingleDeviceSharding(card)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


text = compiled(lambda x, y: x @ y, (2048, 2048), (2048, 2048), dtype=jnp.bfloat16).as_text()
config = re.search(r'"num_warps":"(\d+)","output_tiles":\[\{"sizes":\["(\d+)","(\d+)"\]', text)
print(f"warps {config[1]} tile [{config[2]}, {config[3]}]", end="; ")
m = compiled(jnp.add, (10**5, 10**5), (10**5, 10**5), dtype=jnp.float32).memory_analysis()
print((m.argument_size_in_bytes + m.output_size_in_bytes) // 10**9, "GB compiled for a card of 85")
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/compile.py" | tee "$folder/out"
grep -qF 'warps 2 tile [16, 8]; 120 GB compiled' "$folder/out"
