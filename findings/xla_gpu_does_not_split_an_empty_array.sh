#!/usr/bin/env bash
# jax 0.10.2 and 0.11.0 (with nvidia-cuda-nvcc 13.5.37; libtpu 0.0.42.1; Python 3.12): jax.lax.empty makes an array whose
# values do not matter, for a loop to write into. Where that is split over the devices of a mesh, a TPU's compiler splits it
# as well, and one for NVIDIA's cards does not: every device has all of it, and cuts out its own part afterwards. With
# jnp.zeros in its place both split it. Nothing is wrong in the results; a stack of gradients takes eight times the memory.
#
# Valid input: a loop that writes eight rows into jax.lax.empty, whose last axis is split over eight H100 or four v5e. It
# needs neither of them.
# Seen: 0.10.2 v5e f32[8,1024,256], h100 empty f32[8,1024,1024] zeros f32[8,1024,128]; the same with 0.11.0
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cat > "$folder/compile.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
ROWS, SIDE = 8, 1024
cards = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x8x1").devices
chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def largest(devices, make):
    """Returns the largest array of one device in a program that writes its rows one by one."""
    split = NamedSharding(Mesh(devices, ("x",)), P(None, "x"))
    row = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32, sharding=split)

    def write(row):
        def step(i, stack):
            return jax.lax.dynamic_update_index_in_dim(stack, jnp.sin(row * i), i, 0)

        return jax.lax.fori_loop(0, ROWS, step, make((ROWS, SIDE, SIDE), jnp.float32))

    stack = NamedSharding(split.mesh, P(None, None, "x"))
    text = jax.jit(write, out_shardings=stack).lower(row).compile().as_text()
    return max(re.findall(rf"f32\[{ROWS},{SIDE},\d+\]", text), key=lambda x: int(x[:-1].split(",")[2]))


print(jax.__version__, "v5e", largest(chips, jax.lax.empty), end=", ")
print("h100 empty", largest(cards, jax.lax.empty), "zeros", largest(cards, jnp.zeros))
PYTHON
for version in 0.10.2 0.11.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "jax[cuda13-local]==$version" 'nvidia-cuda-nvcc==13.5.37' 'libtpu==0.0.42.1'
    TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/compile.py"
done | tee "$folder/out"
for version in 0.10.2 0.11.0; do
    grep -qF "$version v5e f32[8,1024,256], h100 empty f32[8,1024,1024] zeros f32[8,1024,128]" "$folder/out"
done
