"""ReLU linear attention.

Log: TPU compiler's estimate, v5e, 0.6B at 1024 px, batch 16, million cycles a layer (see
measure/tpu_estimate.py).

- Two halves with a compact state, heads packed four to the lanes. Predicted 0.28 (reading q, k, v
  once and writing the result: HBM-bound), found 0.29; backward predicted 0.62, found 0.66.
- q, k and v stay in one array and are cut out of their rows inside the kernel, also where a part
  starts in the middle of a lane tile (2240 channels): no copy, where XLA spent 0.9 on splits.
- Denominator as the product with the state of ones: no reduction over lanes, found free.

Log: CUDA compiler's output for an H100 that is not there (README.md says how). Nothing ran.

- One picture with guidance has 72 (0.6B) or 140 (1.6B) sums of a state for 132 multiprocessors,
  each over 16 blocks of tokens in turn. Four or two programs a sum: a launch more, which adds them
  up, 0.9 us by its bytes (0.6B), and a quarter or half of the turns. What that is worth depends on
  latencies, which no compiler tells.
"""

from sana_jax.kernels.linear_attention.api import linear_attention as linear_attention
