#!/usr/bin/env bash
# What needs a GPU, in one command: CUDA correctness, the speed of training, of GIDs and of decoding, then training and
# evaluation of the work folders given.
#
#   bench/gpu.sh OUT WORK...      e.g. bench/gpu.sh runs/gpu runs/phone runs/beauty
#
# A work folder holds corpus/ and gid/ (built anywhere, no Java is needed here) and is named after its config. Copies
# go to OUT/<name>; results to OUT/<name>.json, .md and .log. ARGS adds settings: ARGS="--train.epochs=30".
# Without a GPU the same runs go over the CPU, so that the command can be tried before a device is there.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1
shift
mkdir -p "$out"

if nvidia-smi -L 2>/dev/null | tee "$out/device.txt" | grep -q ^GPU; then
  python -m pytest -m gpu | tee "$out/tests.txt"
  speed=(--shapes default,small,official,base --stages 1,3 --precisions bf16 --peer --steps 20)
  trees=1000000,10000000
  decode=(--device cuda --shapes pooled,tokens,official --users 16)
else
  echo "no GPU: CPU ($(nproc) cores)" | tee "$out/device.txt"
  export DS_ACCELERATOR=cpu
  speed=(--shapes default,tiny --precisions fp32 --peer --steps 2)
  trees=20000
  decode=(--shapes pooled --growth beams --users 4 --repeats 1)
fi

python -m bench.train --config "configs/$(basename "$1").toml" --work "$1" "${speed[@]}" | tee "$out/train.log"
python -m bench.gid --tree-sizes "$trees" | tee "$out/gid.log"
python -m bench.decode "${decode[@]}" | tee "$out/decode.log"
cp bench/results/{train,gid,decode}.{json,md} "$out"

for work in "$@"; do
  name=$(basename "$work")
  mkdir -p "$out/$name"
  cp -r "$work/corpus" "$work/gid" "$out/$name/"
  settings=(--config "configs/$name.toml" "--work=$out/$name" "--tracking.uri=sqlite:///$out/mlflow.db")
  {
    # shellcheck disable=SC2086 # ARGS is a list of words
    python trainer/main.py "${settings[@]}" ${ARGS:-}
    # shellcheck disable=SC2086
    python eval/main.py "${settings[@]}" ${ARGS:-}
  } 2>&1 | tee "$out/$name.log"
  cp "$out/$name/eval/metrics.json" "$out/$name.json"
  cp "$out/$name/eval/table.md" "$out/$name.md"
done
