"""A block of the transformer whose products take int8 rows (W8A8).

Log: TPU compiler's estimate, v5e, 1024 px, million cycles a layer, 0.6B at batch 16 (1.6B at 8). In
bfloat16: 7.13 (12.26).

- Plain jnp: 9.52 (11.19). XLA rounds rows in two passes over them.
- Products in Pallas, with scales, bias, gate and sum in them, and the int8 rows or the modulated
  norm of what they give; the first norm and linear attention give int8 rows. Predicted 4.6 (6.7),
  found 5.08: weights cut out of the stack and laid out anew took 0.48.
- Mix-FFN's halves cut in the layout of the whole: predicted 0.23 less, found 0.10: 4.98 (7.83).
- A kernel reads its layer, and its half of the outputs, where they lie in the stack, by the layer's
  number: predicted 0.30 (1.04) less, found 0.27 (0.97).
- Mix-FFN's middle and attention to text give bfloat16 rows, and the product rounds them: predicted
  0.05 more a product than with int8 rows, found 0.08 and 0.04. To round it, the middle would have
  to hold an image with all channels, and its instructions bind it as the product's do. Kept.
- 512 rows a grid step in place of 256: predicted less, for fewer loads of weights; found 0.01 to
  0.08 more a product. Dropped.
- Sampling: each layer's arrays apart, as in bfloat16, but for the int8 weights. Predicted 1.4 less
  for a step of 41.1 of 1.6B at batch 2, where keys and values of the text, scales, biases and
  tables were cut out of their stacks; found 1.65. Here 4.49 (6.77) in all.
- Outputs in blocks, to hold less of the weights: 0.02 less to 0.02 more, and what does not fill a
  block is copied by loops. Dropped.
"""

from sana_jax.kernels.int8_block.api import int8_block as int8_block
from sana_jax.kernels.int8_block.api import takes as takes
