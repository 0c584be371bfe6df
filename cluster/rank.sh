#!/usr/bin/env bash
# What torch and the stages read of a rank, from what SLURM says of a task.
#   srun cluster/rank.sh python trainer/main.py ...                 runs a program with it
#   srun --task-prolog=cluster/rank.sh python trainer/main.py ...   srun gives it to its tasks (deepspeed's launcher)
set -euo pipefail

# Jobs on one node do not meet at one port; it is below those that the system hands out.
: "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)}"
rank=(
  "RANK=$SLURM_PROCID"
  "LOCAL_RANK=$SLURM_LOCALID"
  "WORLD_SIZE=$SLURM_STEP_NUM_TASKS"
  "MASTER_ADDR=$MASTER_ADDR"
  "MASTER_PORT=$MASTER_PORT"
)
[ $# = 0 ] || exec env "${rank[@]}" "$@"
printf 'export %s\n' "${rank[@]}"
