"""Operations with a kernel, a package each; the files beside them are plain JAX or shared code.

    reference.py  the operation in plain jnp: the specification, and the form without a kernel
    tpu.py        Pallas kernels for TPU (Mosaic); the autoencoder's have the plain form's gradient
    gpu.py        kernels for GPU: Pallas Triton, or cuDNN for cross_attention
    api.py        the dispatching function: names shapes without a kernel, splits others over a mesh

A package exports its dispatching function (res_block also `uses_kernel`), and its docstring is the
log of what was tried, predicted and found. To mean the plain form, write `reference.NAME`.
int8_block is a whole block with int8 products; its plain form is the transformer's own.
dispatch.py decides whether a kernel runs, by platform, dtype, shape and `implementation`. Beside
the kernels for GPU, triton.py alone knows their compiler, and what happens when JAX drops it.
"""
