#!/usr/bin/env bash
# clean-fid 0.1.35 (Python 3.11): get_folder_features(zip, num=N, seed=0) measures other pictures of a .zip at every start of
# Python, though `seed` says otherwise: the names go through a set, whose order follows Python's hash of texts, and are
# sorted for folders only. A FID of a part of a zip is not repeatable; of the same pictures in a folder it is.
#
# Valid input: ten grey pictures in a .zip, num=3, shuffle=True, seed=0, PYTHONHASHSEED 1 and 2. Seen: pictures [2, 3, 6]
# and [0, 2, 9] of the zip; [1, 7, 8] both times of the folder. (torchvision is imported and not needed here: a stand-in
# takes its place, since PyPI's fits no CPU build of torch.)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'numpy==2.4.6' 'scipy==1.17.1' 'pillow==13.0.0' 'tqdm==4.70.1' 'requests==2.34.2'
"$folder/venv/bin/pip" install -q --no-deps 'clean-fid==0.1.35'
cat > "$folder/look.py" <<'PYTHON'
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

warnings.simplefilter("ignore")
torchvision = types.ModuleType("torchvision")
torchvision.transforms = types.SimpleNamespace(
    ToTensor=lambda: lambda array: torch.from_numpy(array).permute(2, 0, 1)
)
sys.modules["torchvision"] = torchvision
sys.modules["cleanfid.features"] = types.SimpleNamespace(
    build_feature_extractor=None, get_reference_statistics=None
)
from cleanfid import fid

pictures = Path(sys.argv[1]) / "pictures"
pictures.mkdir(exist_ok=True)
with zipfile.ZipFile(f"{pictures}.zip", "w") as archive:
    for i in range(10):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(pictures / f"{i}.png")
        archive.write(pictures / f"{i}.png", f"{i}.png")
options = dict(num=3, shuffle=True, seed=0, num_workers=0, device="cpu", verbose=False)
found = fid.get_folder_features(sys.argv[2], lambda x: x[:, 0, 0, 0], **options)
print(sorted(int(shade) for shade in found))
PYTHON
for kind in pictures.zip pictures; do
    for seed in 1 2; do
        PYTHONHASHSEED=$seed "$folder/venv/bin/python" "$folder/look.py" "$folder" "$folder/$kind"
    done > "$folder/$kind.out"
    echo "$kind: $(paste -sd'|' "$folder/$kind.out" | sed 's/|/ and /')"
done
[ "$(sort -u "$folder/pictures.zip.out" | wc -l)" = 2 ]
[ "$(sort -u "$folder/pictures.out" | wc -l)" = 1 ]
