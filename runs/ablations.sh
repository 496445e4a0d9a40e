#!/usr/bin/env bash
# Tables 4 and 5 at nano's scale, three seeds a row, paired by case with 95 % intervals. Run again, it goes on where it
# stopped. Two CPU cores: 40 minutes of pretraining, then 7 minutes (250 steps) and an evaluation for each row and seed.
#   rows="add_scaled add_unscaled" steps=1000 bash runs/ablations.sh      longer, for rows that 250 steps cannot tell apart
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${out:-../nano64} seeds=${seeds:-0 1 2} steps=${steps:-250} cases=${cases:-400} batch=${batch:-32}
rows=${rows:-add_scaled add_unscaled add_shared_patch_embed channel_concat no_stage1 no_images queries queries+latents}
[ "$cached" = 1 ] || last=1 bash runs/nano_cpu.sh

row() {   # NAME SEED train.py's arguments: train, measure
  local run="$out/ablation/$steps/$1-$2"
  [ -f "$run/report/eval.json" ] && return
  until timeout 60m python train.py --config nano --data "$out/clips" "$out/stills" --cache "$out/cache" \
    --resume auto --out "$run" "${@:3}" steps="$steps" seed="$2" workers=1 checkpointing=false dtype=bfloat16 parallel=fsdp \
    global_batch="$batch" batch="$batch" lr=2e-3 warmup=20 schedule=cosine beta2=0.98 optimizer=muon shift=20 weighting=none balance=true; do test $? = 124; done
  python -m nano eval --weights "$run" --steps 2 --data "$out/test" --cases "$cases" --out "$run/report"
}
for seed in $seeds; do
  for name in $rows; do
    case $name in
      no_stage1) row $name "$seed" --stage 2 --weights "$out/pre/weights" --set ;;
      no_images) row $name "$seed" --stage 2 --weights "$out/runs/1" --set image=0 ;;
      queries*)  # Table 5: what references add by their latents, after a stage 2
        row add_scaled "$seed" --stage 2 --weights "$out/runs/1" --set
        row $name "$seed" --stage 3 --weights "$out/ablation/$steps/add_scaled-$seed" --set mllm.context=$name ;;
      *) row $name "$seed" --stage 2 --weights "$out/runs/1" --set model.source=$name ;;
    esac
  done
done

reports() { for seed in $seeds; do echo "$out/ablation/$steps/$1-$seed/report"; done; }
for name in $rows; do
  base=add_scaled; [ "$name" = queries ] && base=queries+latents
  [ "$name" = "$base" ] || [ "$name" = queries+latents ] && continue
  printf '\n%s against %s\n\n' "$name" "$base"
  python -m nano compare $(reports "$name") --to $(reports "$base")
done
