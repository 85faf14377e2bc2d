"""Softmax attention to the text rows.

Log: TPU compiler's estimate, v5e, 0.6B at 1024 px, batch 16, 300 rows, million cycles a layer.

- Predicted 0.4 (the products, heads of 72 padded to 128), found 0.87 with text rows in the lanes;
  XLA took 2.0. Division replaced by an approximate reciprocal: 0.91 to 0.87.
- Text rows in the sublanes, result transposed at the end: 0.68. Blocks of 512 tokens, so that
  each weight tile of the matrix unit serves more rows: 0.55. Blocks of 128 were at 1.0.
- Backward with blocks of 256: predicted 0.9, found 1.16.

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
