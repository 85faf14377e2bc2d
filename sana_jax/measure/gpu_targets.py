"""NVIDIA cards to compile for, by the vendor's data sheets, and how XLA is told of them.

XLA compiles for a card that is not there if a text proto describes it, its GpuTargetConfigProto:
limits, sizes and speeds. The public descriptions of an A100, H100 and H200 in XLA's repository
(xla/backends/gpu/target_config/specs) have the same figures.
"""

import dataclasses

GB = 10**9
TERA = 10**12


@dataclasses.dataclass(frozen=True)
class Card:
    """The vendor's figures of one card."""

    kind: str  # as the driver, and so JAX, names it
    capability: tuple[int, int]  # (9, 0): sm_90
    multiprocessors: int
    float32_units: int  # of a multiprocessor
    hertz: float  # boost
    warps: int  # that a multiprocessor holds at once
    shared_bytes: int  # of a multiprocessor; a block may have 1 KiB less
    l2_bytes: int
    memory_bytes: int  # as the driver counts them
    bytes_per_second: float
    half_flops: float  # of tensor cores, dense, bfloat16 or float16 with float32 sums, a second
    tf32_flops: float  # of float32 products at the default precision

    @property
    def float32_flops(self) -> float:
        """FLOPs a second without tensor cores: float32 products at the highest precision."""
        return 2 * self.float32_units * self.multiprocessors * self.hertz

    def peak_flops(self, dtype: str, highest: bool = False) -> float:
        """Returns the FLOPs a second of products of `dtype`, as HLO writes it, such as "bf16"."""
        if dtype in ("bf16", "f16"):
            return self.half_flops
        if dtype.startswith("f8") or dtype == "s8":
            return 2 * self.half_flops
        return self.float32_flops if highest else self.tf32_flops


_HOPPER = dict(
    capability=(9, 0),
    multiprocessors=132,
    float32_units=128,
    hertz=1.98e9,
    warps=64,
    shared_bytes=228 * 1024,
    l2_bytes=50 * 2**20,
    half_flops=989.4 * TERA,
    tf32_flops=494.7 * TERA,
)
_ADA = dict(capability=(8, 9), float32_units=128, warps=48, shared_bytes=100 * 1024)

CARDS = {
    "a100": Card(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        multiprocessors=108,
        float32_units=64,
        hertz=1.41e9,
        warps=64,
        shared_bytes=164 * 1024,
        l2_bytes=40 * 2**20,
        memory_bytes=85_100_068_864,
        bytes_per_second=2039 * GB,
        half_flops=312 * TERA,
        tf32_flops=156 * TERA,
    ),
    "h100": Card(
        kind="NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        bytes_per_second=3352 * GB,
        **_HOPPER,
    ),
    "h200": Card(
        kind="NVIDIA H200",
        memory_bytes=151_397_597_184,
        bytes_per_second=4800 * GB,
        **_HOPPER,
    ),
    "l4": Card(
        kind="NVIDIA L4",
        multiprocessors=58,
        hertz=2.04e9,
        l2_bytes=48 * 2**20,
        memory_bytes=23_034 * 2**20,
        bytes_per_second=300 * GB,
        half_flops=121 * TERA,
        tf32_flops=60 * TERA,
        **_ADA,
    ),
    "l40s": Card(
        kind="NVIDIA L40S",
        multiprocessors=142,
        hertz=2.52e9,
        l2_bytes=96 * 2**20,
        memory_bytes=46_068 * 2**20,
        bytes_per_second=864 * GB,
        half_flops=362 * TERA,
        tf32_flops=183 * TERA,
        **_ADA,
    ),
    "4090": Card(
        kind="NVIDIA GeForce RTX 4090",
        multiprocessors=128,
        hertz=2.52e9,
        l2_bytes=72 * 2**20,
        memory_bytes=24_564 * 2**20,
        bytes_per_second=1008 * GB,
        half_flops=165.2 * TERA,
        tf32_flops=82.6 * TERA,
        **_ADA,
    ),
}


def target_config(card: Card) -> str:
    """Returns the text proto that describes a card to XLA, of CUDA 13 with cuDNN 9.12."""
    major, minor = card.capability
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {card.multiprocessors}
          fpus_per_core: {card.float32_units}
          clock_rate_ghz: {card.hertz / 1e9}
          threads_per_warp: 32
          threads_per_core_limit: {32 * card.warps}
          threads_per_block_limit: 1024
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: {card.shared_bytes}
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {card.shared_bytes - 1024}
          l2_cache_size: {card.l2_bytes}
          device_memory_size: {card.memory_bytes}
          memory_bandwidth: {round(card.bytes_per_second)}
          driver_version: "13.0.0"
          runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0"
          dnn_version: "9.12.0"
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{card.kind}"
    """
