"""Operations that are worth a kernel, each a package that exports its dispatching function.

    reference.py  the operation in plain jnp: the specification, and what runs without a kernel
    tpu.py        Pallas kernels for TPU (Mosaic), forward and backward
    gpu.py        Pallas kernels for GPU (Triton), where there are any
    api.py        the dispatching function: says which shapes have a kernel, splits them over a mesh

dispatch.py decides whether a kernel runs: by platform, dtype and the caller's `implementation`. Who
means the plain form whatever the platform writes `reference.linear_attention`. The log of what was
tried, predicted and found is the docstring of each package. Loose files are plain JAX.
"""
