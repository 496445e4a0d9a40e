#!/usr/bin/env bash
# A LoRA on your own clips, on one card: my/ has video.csv (src_video, tgt_video, prompt), image.csv or ref_video.csv, and
# held/ a few rows more that are not trained. 24 GB as it stands, 16 GB with the cache, 12 GB with quantise=fp8.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${data:-my} val=${val:-held} out=${out:-runs/mine} cache=${cache:-cache/mine} quantise=${quantise:-} settings=${settings:-steps=2000}
weights=${weights:-linyq/kiwi-edit-5b-instruct-reference-diffusers} config=${config:-wan22_5b}

common="--preset lora --config $config --data $data --val $val --weights $weights ${quantise:+--quantise $quantise}"
python data.py check "$data"/*.csv
python data.py cache --out "$cache" $common --set $settings
python train.py $common --cache "$cache" --out "$out" --resume auto --set $settings
python train.py --plot "$out"
python train.py --export-lora "$out" --format comfy --out "$out/lora.safetensors"
