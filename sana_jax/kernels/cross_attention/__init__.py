"""Softmax attention to the text rows.

Log: TPU compiler's estimate, v5e, 0.6B at 1024 px, batch 16, 300 rows, million cycles a layer.

- Predicted 0.4 (the products, heads of 72 padded to 128), found 0.87 with text rows in the lanes;
  XLA took 2.0. Division replaced by an approximate reciprocal: 0.91 to 0.87.
- Text rows in the sublanes, result transposed at the end: 0.68. Blocks of 512 tokens, so that
  each weight tile of the matrix unit serves more rows: 0.55. Blocks of 128 were at 1.0.
- Backward with blocks of 256: predicted 0.9, found 1.16.
- Without the softmax 0.48 of 0.55, without the stores 0.43: what costs is moving heads of 72 lanes
  to and from whole tiles. Results gathered transposed and turned at the end: predicted 0.45, found
  0.44; with all 1024 tokens in a block 0.39 (1.6B at batch 8: 0.36 to 0.31). Backward, with blocks
  of 512, 1.16 to 1.04 (0.76 to 0.72); and keys' and values' cotangents leave it as bfloat16, which
  took XLA 0.36.
- No gain: a head's part of a tile masked in place of shifted (0.63), queries transposed too (0.39),
  logits a head ahead of the softmax (0.60), 128 or 256 tokens of a block at once (0.83, 0.67); sums
  for keys and values by head, or transposed (backward 1.08, 1.00; 1.6B 0.75, 0.76).

Log: CUDA compiler's output for an H100 that is not there, 0.6B at 1024 px, 32 images, bfloat16,
us a layer by bytes, products and instructions (README.md says how). Nothing ran.

- XLA writes float32 logits to memory: products 366, softmax, pads and transposes 664.
- cuDNN's attention: predicted 58 (its products; bytes alone 47), 1 launch in place of 5. What is
  inside cuDNN the compiler does not show, so 58 is an estimate.
- The mask as a bias of the logits: 20 MB more to read in each layer. Lengths cost nothing.
- Keys and values cut apart once a call, not in each layer and step: 26 less.
"""

from sana_jax.kernels.cross_attention.api import cross_attention as cross_attention
from sana_jax.kernels.cross_attention.api import visible_first as visible_first
