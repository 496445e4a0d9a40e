#!/usr/bin/env bash
# Pairs -> RefVIE quadruplets -> training; edits -> scores. With the paper's models on 8 GPUs; see docs/curation.md for
# GPU-days and docs/judging.md for the price of a judge. Run it again and it goes on where it stopped.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pairs=${pairs:-pairs.csv} out=${out:-out/refvie} bench=${bench:-refvie_bench.yaml} weights=${weights:-runs/3}

torchrun --nproc-per-node 8 curate.py "$pairs" --out "$out" --models paper   # look at $out/page.html, save rejects.json
torchrun --nproc-per-node 8 train.py --stage 3 --data "$out" --resume auto

torchrun --nproc-per-node 8 judge.py run --bench refvie "$bench" --weights "$weights" --edits out/edits
python judge.py score --bench refvie "$bench" --edits out/edits --judge metrics --out out/judge          # free
python judge.py score --bench refvie "$bench" --edits out/edits --judge gemini-3-flash-preview --repeats 3 --out out/judge
