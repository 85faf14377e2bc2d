#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0, Python 3.11): a LoRA whose `alpha_pattern` has two patterns for one module computes something
# else after save_pretrained and from_pretrained, without a word. Of the patterns that match a module the first one counts,
# in the order of the dict; adapter_config.json is written with sorted keys, so that another one is the first when it is read.
#
# Valid input: two modules, x.proj and y.proj, r=4, alpha_pattern={"x.proj": 16, "proj": 4}: x.proj has a scale of 4, y.proj of
# 1. Seen: x.proj has a scale of 1 after the reload, and the outputs differ. The same in `rank_pattern` is an error of shapes
# at the reload ("size mismatch for ...").
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'torch==2.13.0' 'peft==0.21.2'
cat > "$folder/look.py" <<'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
        self.y = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})

    def forward(self, value):
        return self.y["proj"](self.x["proj"](value))


def scales(model):
    return [getattr(model.base_model.model, name)["proj"].scaling["default"] for name in "xy"]


torch.manual_seed(0)
base, value = Net(), torch.randn(2, 8)
patterns = {"x.proj": 16, "proj": 4}

config = LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False, alpha_pattern=patterns)
before = get_peft_model(copy.deepcopy(base), config)
before.save_pretrained(sys.argv[1] + "/alpha")
after = PeftModel.from_pretrained(copy.deepcopy(base), sys.argv[1] + "/alpha")
print("scales", scales(before), "->", scales(after), end=", ")
print("same output:", torch.allclose(before(value), after(value), atol=1e-3))

config = LoraConfig(r=4, target_modules=["proj"], rank_pattern=patterns)
get_peft_model(copy.deepcopy(base), config).save_pretrained(sys.argv[1] + "/rank")
try:
    PeftModel.from_pretrained(copy.deepcopy(base), sys.argv[1] + "/rank")
    print("ranks: loaded")
except RuntimeError as error:
    print("ranks: size mismatch" if "size mismatch" in str(error) else error)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" | tee "$folder/out"
grep -q "scales \[4.0, 1.0\] -> \[1.0, 1.0\], same output: False" "$folder/out"
grep -q "ranks: size mismatch" "$folder/out"
