#!/usr/bin/env bash
# torch 2.13.0 (CPU, Python 3.11): interpolate(mode="bilinear") on contiguous float32 pictures gives other last bits with one
# thread than with two or more: 39 % of the values of a 512 px picture resized to 299 px differ, by up to 1.8e-7.
#
# Valid input: random values in [0, 1], shape (1, 3, 512, 512), align_corners=False, the resize before Inception-v3 in
# pytorch-fid. Two, three and four threads agree with one another to the bit. So figures such as FID depend, in their last
# digits, on the number of cores or on OMP_NUM_THREADS, and "equal to the bit" holds only for a stated number of threads.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' numpy
cat > "$folder/look.py" <<'PYTHON'
import torch

pictures = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
resized = {}
for threads in 1, 2, 3, 4:
    torch.set_num_threads(threads)
    resized[threads] = torch.nn.functional.interpolate(
        pictures, size=(299, 299), mode="bilinear", align_corners=False
    )
for threads, found in resized.items():
    differs = found != resized[2]
    error = (found - resized[2]).abs().max()
    print(f"{threads} threads: {differs.float().mean():.1%} differ from two threads', by {error:.1e}")
print("more than one agree:", all(torch.equal(resized[n], resized[2]) for n in (3, 4)))
print("one agrees:", torch.equal(resized[1], resized[2]))
PYTHON
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/out"
grep -q "more than one agree: True" "$folder/out"
grep -q "one agrees: False" "$folder/out"
