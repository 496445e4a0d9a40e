#!/usr/bin/env bash
# nano from nothing: no data and no weights -> weights that are measured. Run it again and it goes on where it stopped.
# 64x64, 9 frames, two CPU cores: 85 minutes (measured). Needs npm for the emoji and panoramas (104 MB).
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${out:-../nano64} size=${size:-64} frames=${frames:-9} clips=${clips:-4000} stills=${stills:-16000} assets=${assets:-../assets}
cores=${cores:-2} loaders=${loaders:-1} minutes=${minutes:-60} machine=${machine:-two CPU cores}
vae=${vae:-2500} mllm=${mllm:-400} dit=${dit:-250} stage1=${stage1:-200} stage2=${stage2:-700} stage3=${stage3:-1900}
batch=${batch:-32} rate=${rate:-2e-3} warmup=${warmup:-20}

draw() { [ -f "$out/$1/truth.jsonl" ] || python -m nano data "$out/$1" --assets "$assets" --size "$size" --workers "$cores" "${@:2}"; }
[ -f "$assets/index.json" ] || python -m nano assets "$assets"
draw clips --clips "$clips" --frames "$frames"
draw stills --clips "$stills" --frames 1 --seed 1
draw test --clips 400 --frames "$frames" --split test

pretrain() { until python -m nano pretrain "$@" --data "$out/clips" --out "$out/pre" --minutes "$minutes"; do test $? = 75; done; }
pretrain vae --steps "$vae"
pretrain mllm --steps "$mllm"
pretrain dit --steps "$dit"

all="--config nano --data $out/clips $out/stills"
CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 torchrun --nproc-per-node "$cores" data.py cache --stage 3 $all --weights "$out/pre/weights" --out "$out/cache" --set dtype=bfloat16
stage() { until timeout "${minutes}m" python train.py $all --cache "$out/cache" --resume auto "$@" \
  workers="$loaders" checkpointing=false dtype=bfloat16 parallel=fsdp lr="$rate" warmup="$warmup" schedule=cosine beta2=0.98 optimizer=muon global_batch="$batch" batch="$batch"; do test $? = 124; done; }
few="shift=20 weighting=none balance=true"   # edits in two steps: noisy timesteps matter, and the small places that an edit changes
stage --stage 1 --weights "$out/pre/weights" --out "$out/runs/1" --set steps="$stage1"
[ "$last" = 1 ] && exit   # what runs/ablations.sh starts from
stage --stage 2 --weights "$out/runs/1" --out "$out/runs/2" --set steps="$stage2" $few
stage --stage 3 --weights "$out/runs/2" --out "$out/runs/3" --set steps="$stage3" $few image=2 video=1 ref=2

python -m nano ship "$out/runs/3" --weights "$out/pre/weights" --data "$out/test" --example 2 --made-by "$machine" --out "$out/nano"
python -m nano eval --weights "$out/nano" --data "$out/test" --out "$out/report" --card
echo "$((SECONDS / 60)) minutes"
