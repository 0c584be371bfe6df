#!/usr/bin/env bash
# What needs a GPU, in one command: CUDA correctness, the speed of training, of GIDs and of decoding, then training and
# evaluation of the work folders given.
#
#   bench/gpu.sh OUT WORK...      e.g. bench/gpu.sh runs/gpu runs/phone runs/beauty
#
# A work folder holds corpus/ and gid/ (built anywhere, no Java is needed here) and is named after its config. Copies
# go to OUT/<name>; results to OUT/<name>.json, .md and .log. ARGS adds settings: ARGS="--train.epochs=30". STEPS says
# which steps, of "tests train gid decode work", WORK's all at the same time with TOGETHER=1. A step that fails does not
# stop the others, but the command fails in the end.
# Without a GPU the same runs go over the CPU, so that the command can be tried before a device is there.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if nvidia-smi -L 2>/dev/null | tee "$out/device.txt" | grep -q ^GPU; then
  tests=gpu
  train=(--shapes default,official,base --stages 1 --precisions bf16 --peer --steps 20)
  gid=(--tree-sizes 1000000 --tree-devices faiss-gpu,cuda,cpu)
  decode=(--device cuda --shapes pooled,tokens,official --users 32 --max-items 1000000)
else
  echo "no GPU: CPU ($(nproc) cores)" | tee "$out/device.txt"
  export DS_ACCELERATOR=cpu
  tests="not gpu and not slow and not slurm" # of the same files
  train=(--shapes default,tiny --stages 1 --precisions fp32 --peer --steps 2)
  gid=(--tree-sizes 20000)
  decode=(--shapes pooled --growth beams --users 4 --repeats 1)
fi
failed=0

# NAME COMMAND...: its output to NAME.log as well, and the seconds that it took.
step() {
  local name=$1 begin=$SECONDS
  shift
  if "$@" 2>&1 | tee "$out/$name.log"; then
    echo "== $name: $((SECONDS - begin)) s"
  else
    echo "== $name FAILED after $((SECONDS - begin)) s"
    failed=1
  fi
}

speed() {
  step "$@"
  cp bench/results/"$1".{json,md} "$out"
}

# Trains and evaluates a work folder.
run() {
  local name settings
  name=$(basename "$1")
  mkdir -p "$out/$name"
  cp -r "$1/corpus" "$1/gid" "$out/$name/"
  settings=(--config "configs/$name.toml" "--work=$out/$name" "--tracking.uri=sqlite:///$out/mlflow-$name.db")
  # shellcheck disable=SC2086 # ARGS is a list of words
  python trainer/main.py "${settings[@]}" ${ARGS:-} && python eval/main.py "${settings[@]}" ${ARGS:-} || return
  cp "$out/$name/eval/metrics.json" "$out/$name.json"
  cp "$out/$name/eval/table.md" "$out/$name.md"
}

for what in ${STEPS:-tests train gid decode work}; do
  case $what in
    tests) step tests python -m pytest -m "$tests" tests/trainer/test_{gpu,tables,recommender}.py tests/gid/test_kmeans.py ;;
    train) speed train python -m bench.train --config "configs/$(basename "$1").toml" --work "$1" "${train[@]}" ;;
    gid) speed gid python -m bench.gid "${gid[@]}" ;;
    decode) speed decode python -m bench.decode "${decode[@]}" ;;
    work)
      if [ "${TOGETHER:-}" ]; then
        running=()
        for work in "$@"; do
          run "$work" >"$out/$(basename "$work").log" 2>&1 &
          running+=($!)
        done
        for pid in "${running[@]}"; do wait "$pid" || failed=1; done
      else
        for work in "$@"; do step "$(basename "$work")" run "$work"; done
      fi
      ;;
    *) echo "no such step: $what" >&2; failed=1 ;;
  esac
done
exit "$failed"
