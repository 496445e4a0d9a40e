#!/usr/bin/env bash
# The same at 128x128, 17 frames, on one H100, in pieces of nine minutes that resume. Not run yet: its steps, and the 25
# minutes that they should take, are estimates.
set -e
export out=${out:-../nano128} size=128 frames=17 clips=8000 stills=24000 cores=16 loaders=12 minutes=9 machine="one H100"
export vae=4000 mllm=2000 dit=3000 stage1=600 stage2=2000 stage3=2000 batch=64 rate=1e-3 warmup=50
. "$(dirname "${BASH_SOURCE[0]}")/nano_cpu.sh"
