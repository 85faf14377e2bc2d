"""Block sizes of the kernels by platform, and why.

One column for v5e, v5p and v6e: the sizes were chosen by the estimate for v5e, and every kernel
compiles with them for all three. Images with fewer tokens than a block take one block of their own
size; channels always come in groups of 128 lanes.
"""

# Tokens or pixels a grid step, or a turn of an unrolled loop.
TPU = {
    "linear_attention": 512,  # two steps an image of 1024 tokens: one loads while one computes
    "modulated_norm": 256,  # bound by HBM: only small enough that the widest model fits VMEM
    # A tile of weights in the matrix unit serves so many rows: 128 took 1.8 times as long. Backward
    # keeps three arrays of logits beside one another.
    "cross_attention": 512,
    "cross_attention_backward": 256,
    # Enough to hide the latency of tanh, few enough for the registers: filling needs one result a
    # vector, the convolution an accumulator.
    "glumbconv_fill": 256,
    "glumbconv_convolve": 128,
    # Rows: eight read half as much again as they write; fewer where VMEM does not hold their sums.
    "res_block": (8, 4, 2),
}

# Never timed: tiles of the tensor cores, elements for four warps.
GPU = {
    "linear_attention": 64,  # tokens
    "glumbconv_columns": 8,
    "glumbconv_channels": 64,
}
