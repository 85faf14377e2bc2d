"""How XLA compiles for the tests: most of the suite's time is that."""

from importlib.metadata import version


def flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices.

    LLVM does not optimize: programs are the same but for their last instructions, and compile four
    times faster. It gets a program whole, as parts for several threads take longer in all. Commands
    that draw or measure run with the flags of their users instead.
    """
    quick = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):  # later ones end the process over this flag
        quick += " --xla_cpu_use_fusion_emitters=false"
    return f"--xla_force_host_platform_device_count={devices} {quick}"
