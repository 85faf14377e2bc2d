"""The middle of Mix-FFN.

Log: TPU compiler's estimate, v5e, 0.6B at 1024 px, batch 16, million cycles a layer (see
measure/tpu_estimate.py).

- Nine unaligned loads from a zero-bordered float32 scratch, SiLU as tanh. Predicted 0.58 (25 vector
  operations on four slots), found 1.39: the loops were too short to hide tanh.
- Loops unrolled to 256 and 128 pixels: 0.98. The border cleared with each row in place of once an
  image: 0.78. HBM needs 0.52.
- Backward, everything recomputed from value and gate: predicted 1.9, found 2.28; HBM needs 0.87.
- Value and gate as two products: no split of the wide array (0.7), a slice of the weights (0.05).
- Backward also gives the forward result, for the gradients of the product and the factor that
  follow, so that rematerialisation runs no kernel forward: predicted 0.75 less, found 0.79 (the
  kernel takes 2.27 with it, which is noise).
- Backward, the product's weights of a layer cut out of the stack before they are used: predicted
  0.43 less, found 0.25.
- The factor's product written down before the two products that read it: predicted 0.15 less, found
  0.34 more, since they are no faster for it. Not done.

With these and `bias`, forward and backward with full rematerialisation, depth 28: from 34.0 to 31.6
a layer, 43.0 % to 46.3 % of the bfloat16 peak.
"""

from sana_jax.kernels.glumbconv.api import glumbconv as glumbconv
