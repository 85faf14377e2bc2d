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

Log: CUDA compiler's output for an H100 that is not there, 1.6B at 1024 px, 32 images, bfloat16,
us a call by bytes, and by instructions (README.md says how). Nothing ran.

- XLA: a pass that pads, adds and activates, 466 by bytes and 582 by instructions, and one that
  convolves, 357 and 712. A block of columns and channels in Triton, three shifted loads a pixel:
  329 and 1442.
- Every column a vector of its own, so that SiLU is computed 1.5 times a pixel in place of three:
  predicted 329 and 241 (44 instructions a result), found 424: 75. Neither XLA nor Triton made one
  instruction of a product and a sum.
- Product and sum in one instruction by PTX, eight columns: predicted 261, found 226. Four: 249, but
  16 warps an SM in place of 12.
- Pixels outside the image made zero by a comparison, as nothing says how the fast tanh ends:
  predicted 34 more, found 34.
- Value and gate read from one product: in 0.6B XLA cut the weights of each layer (two slices of 4
  us), or at batch 1 made one product of the two and cut that (two of 7 us).
- Backward, the same form: predicted 876 and 1026 by bytes, 384 by instructions for the second;
  found 876 and 914, 479 by instructions. Before: 1513 and 2023 by instructions. XLA: 7826.
"""

from sana_jax.kernels.glumbconv.api import glumbconv as glumbconv
