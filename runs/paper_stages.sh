#!/usr/bin/env bash
# The paper's three stages (Section 5.1) on one machine of 8 GPUs: data/ has image.csv, video.csv, ref_video.csv.
# Run it again and it goes on where it stopped. What a card needs: python train.py --stage 3 --gpus 8 --dry-run
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${data:-data} out=${out:-runs} gpus=${gpus:-8} config=${config:-wan22_5b} preset=${preset:-paper} weights=${weights:-}

for stage in 1 2 3; do
  start=${weights:+--weights $weights}
  [ "$stage" -gt 1 ] && start="--weights $out/$((stage - 1))"
  torchrun --nproc-per-node "$gpus" train.py --config "$config" --preset "$preset" --stage "$stage" --data "$data" $start \
    --out "$out/$stage" --resume auto
done
python train.py --export "$out/3" --out weights/mine
