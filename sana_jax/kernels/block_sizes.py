"""Block sizes of the kernels by platform, with their reasons.

v5e, v5p and v6e share one table: the sizes were chosen by the estimate for v5e, and every kernel
compiles with them for all three. An image with fewer tokens than a block takes one block of its own
size; channels always come in groups of 128 lanes.
"""

# Tokens or pixels in a grid step, or in an iteration of an unrolled loop.
TPU = {
    "linear_attention": 512,  # two steps for 1024 tokens: one loads while the other computes
    "modulated_norm": 256,  # bound by HBM, so it need only fit the widest model into VMEM
    # The more tokens, the fewer times are keys and values moved to whole tiles: 128 took 2.6 times
    # as long. The backward pass keeps three arrays of logits at once, so its blocks are smaller.
    # Both are halved above 384 text rows.
    "cross_attention": 1024,
    "cross_attention_backward": 512,
    # Enough to hide the latency of tanh, few enough for the registers: filling keeps one result for
    # each vector, the convolution an accumulator.
    "glumbconv_fill": 256,
    "glumbconv_convolve": 128,
    # Rows: eight read half as much again as they write; fewer if VMEM does not hold their sums.
    "res_block": (8, 4, 2),
    # Rows of the small picture, of which two more are read; else as above.
    "upsample": (8, 4, 2, 1),
    "scaled_product": 512,  # inputs: for each block of them the cotangent is read once
    "int8": 256,  # rows that a tile of weights serves
    "image_head": (16, 8, 4, 2, 1),  # rows: two more are read
    # Pixels of a product, and of the depthwise convolution between them: as above.
    "multiscale_attention": 512,
    "multiscale_convolve": 128,
}

# Never timed; chosen by the registers and instructions of compiled kernels, for 100 to 140 SMs.
GPU = {
    # Tokens by bytes of a number. Float32 uses no tensor cores: twice as many spilled registers.
    "linear_attention": {2: 64, 4: 32},
    # Programs that a state's sum over tokens is split into: two for each SM.
    "linear_attention_programs": 256,
    # A program is one warp. Four columns take 128 registers, so 16 warps fit an SM; eight take a
    # tenth less instructions, but 168 registers. 64 channels: a whole sector of HBM in bfloat16.
    "glumbconv_columns": 4,
    "glumbconv_channels": 64,
    # Below this number of programs, strips are split into fewer rows, but not below these: a strip
    # reads two rows more than it writes.
    "glumbconv_programs": 1024,
    "glumbconv_rows": 8,
}
