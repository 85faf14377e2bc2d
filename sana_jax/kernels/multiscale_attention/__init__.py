"""ReLU linear attention over an image and its neighbourhoods, of the autoencoder.

Log: TPU compiler's estimate, v5e, bfloat16, one picture of 1024 px, million cycles an EfficientViT
block of the decoder at 64 x 64 and 1024 channels / 128 x 128 and 512.

- XLA: 7.0 / 11.8.
- The kernel, with all of the attention between the products: predicted 0.4 / 0.7 and a block of
  2.0 / 2.9. Found 0.7 / 1.7 and 2.7 / 5.2: with three groups of 128 lanes in one array, every load
  at an odd row is two, a rotation and a select, and XLA took 0.2 / 0.7 to put the heads of one
  scale before those of the next.
- An array for each part, and results copied by the kernel to where they belong: 0.4 / 0.9 and
  2.3 / 3.5. A step waits for its last copy, about 0.02 / 0.03 a block that no estimate has.
- What is left is near its products: Mix-FFN 1.2 / 1.7, qkv and output 0.4 / 0.6, norms 0.2 / 0.3.
"""

from sana_jax.kernels.multiscale_attention.api import multiscale_attention as multiscale_attention
