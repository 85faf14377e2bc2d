"""A residual block of the autoencoder.

Log: TPU compiler's estimate, v5e, bfloat16, one picture of 1024 px, million cycles a block at 128
channels of 1024 px / 256 of 512 px / 512 of 256 px. The products alone need 4.7 in all three.

- XLA: 27.0 / 16.2 / 10.3, that is 17 / 29 / 46 % of the peak. The picture is copied to pad it, the
  norm reads and writes it three times in float32, and the sum once more.
- A barrier before the norm keeps it in bfloat16: 24.9 in place of 27.0. Its sum of squares as a
  product with ones: 29.6. Neither is done, since one kernel for all of it leaves nothing between.
- The kernel: predicted 8, found 5.9 / 4.8 / 4.9. The three columns of taps are one product of three
  times the width either way, so that only two of its thirds have to be shifted by a pixel.
- Three products instead, which take the taps as they are stored: the same 4.9 at 512 channels, and
  XLA does not turn the weights before it, which took 0.3 a block.
- XLA copies the picture of a loop's turn twice, since it does not know that the kernel is done with
  it: 3.2 / 1.6 / 0.8 a block, so a stage's blocks are unrolled.

What is left of the last stage at 1024 px, 66 in all, is 18 for its three blocks, 13 for the
convolution that doubles, 14 for the duplicated shortcut and 14 for rearranging pixels. The shortcut
written as repeated columns takes 1.1 less, and is not done.
"""

from sana_jax.kernels.res_block.api import res_block as res_block
from sana_jax.kernels.res_block.api import uses_kernel as uses_kernel
