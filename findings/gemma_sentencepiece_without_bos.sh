#!/usr/bin/env bash
# transformers 5.24.0 (with sentencepiece 0.2.3, Python 3.11): a Gemma tokenizer that is made from `tokenizer.model` alone
# puts no <bos> before a text, and says nothing, though it knows the token. Gemma was trained with <bos> before every text,
# and published tokenizer.json files add it, so whatever reads the text gets other embeddings.
#
# Valid input: a SentencePiece model with Gemma's special tokens, trained here on two sentences, in a folder without
# tokenizer_config.json, as conversion scripts of other frameworks leave it.
# Seen: first token: a bos: <bos>
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'transformers==5.24.0' 'sentencepiece==0.2.3' 'protobuf==7.36.2'
cat > "$folder/look.py" <<'PYTHON'
import sys
from pathlib import Path

import sentencepiece
from transformers import GemmaTokenizer

folder = Path(sys.argv[1])
(folder / "text").write_text("a red circle above a blue square\na green star\n" * 50)
(folder / "gemma").mkdir()
sentencepiece.SentencePieceTrainer.train(
    input=str(folder / "text"), model_prefix=str(folder / "gemma/tokenizer"), model_type="bpe",
    vocab_size=60, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
    bos_piece="<bos>", byte_fallback=False, minloglevel=2,
)
tokenizer = GemmaTokenizer.from_pretrained(folder / "gemma")
ids = tokenizer("a red circle")["input_ids"]
print("first token:", tokenizer.convert_ids_to_tokens(ids)[0], "bos:", tokenizer.bos_token)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" | tee "$folder/out"
grep -q "first token: a " "$folder/out"
grep -q "bos: <bos>" "$folder/out"
