# shellcheck shell=bash
# Sourced by the batch scripts of the stages, after the file that cluster/submit.py wrote for the stage. That one sets
# STAGE ROOT CONFIG LOGS, NODES (the numbers of nodes that will do, largest first), RANKS CPUS GPUS (per node),
# INTERFACE LOCAL_DISK MAX_REQUEUES VENV MODULES, SRUN and EXEC (options and prefix of the container), SPARK.
# shellcheck disable=SC2153

# Before the shell is made strict: the functions of module systems are not written for that.
for module in "${MODULES[@]}"; do
  module load "$module" || exit
done
set -euo pipefail

[ -z "$VENV" ] || export PATH="$VENV/bin:$PATH"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CPUS / RANKS))}"
[ "$GPUS" -gt 0 ] || export DS_ACCELERATOR=cpu
[ -z "$INTERFACE" ] || export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
LOG="$LOGS/$STAGE-$SLURM_JOB_ID.log"

# SLURM signals the tasks, which save and end by themselves; this script lives on, to say what comes next.
trap : TERM USR1

say() {
  printf '[%s %s] %s\n' "$STAGE" "$(date +%T)" "$*"
}

die() {
  say "error: $*"
  say "stage $STAGE failed, and the jobs after it are cancelled: $LOG has the reason." \
    "Mend it and submit again: what is complete is not run again"
  exit 1
}

# step NODE,NODE... TASKS_PER_NODE COMMAND...: runs the command on these nodes of the job.
step() {
  local nodes=$1 tasks=$2 count
  count=$(tr , '\n' <<<"$nodes" | wc -l)
  shift 2
  # --wait and --kill-on-bad-exit: ranks that lost one end by themselves, and say which; the first works longest.
  srun --overlap --mem=0 --nodelist="$nodes" --nodes="$count" --ntasks=$((count * tasks)) \
    --ntasks-per-node="$tasks" --cpus-per-task=$((CPUS / tasks)) --wait=0 --kill-on-bad-exit=0 \
    ${SRUN[@]+"${SRUN[@]}"} ${EXEC[@]+"${EXEC[@]}"} "$@"
}

# Sets FIT to the nodes to work on, separated by commas, and MASTER_ADDR to the first. Names those that are unfit.
check_nodes() {
  local node count answer silent='' all fit=()
  mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on ${all[*]}"
  export MASTER_ADDR=${all[0]}
  local folder="$LOGS/.health-$SLURM_JOB_ID"
  rm -rf "$folder"
  mkdir "$folder"
  echo "$SLURM_JOB_ID" >"$folder/shared"
  for node in "${all[@]}"; do
    # One step for each: a node that does not answer takes no other with it.
    timeout 180 srun --overlap --mem=0 --nodelist="$node" --nodes=1 --ntasks=1 --cpus-per-task="$CPUS" \
      ${SRUN[@]+"${SRUN[@]}"} ${EXEC[@]+"${EXEC[@]}"} python "$ROOT/cluster/health.py" --node "$node" \
      --nodes "${#all[@]}" --gpus "$GPUS" --interface "$INTERFACE" --shared "$folder" --local "$LOCAL_DISK" \
      >"$folder/answer-$node" 2>"$folder/errors-$node" &
  done
  wait
  for node in "${all[@]}"; do
    answer=$(tail -n 1 "$folder/answer-$node")
    if [ "$answer" = fit ]; then
      fit+=("$node")
    elif [ "$answer" ]; then
      say "node $node is unfit: $answer"
    else
      say "node $node does not answer: $(tail -n 1 "$folder/errors-$node")"
      silent=$node
    fi
  done
  rm -rf "$folder"
  for count in "${NODES[@]}"; do
    if [ "$count" -le "${#fit[@]}" ]; then
      [ "$count" = "${#all[@]}" ] || say "works on $count of ${#all[@]} nodes"
      FIT=$(IFS=, && echo "${fit[*]:0:count}")
      MASTER_ADDR=${fit[0]}
      return
    fi
  done
  [ -z "$silent" ] || requeue "the stage needs ${NODES[-1]} nodes or more, and $silent does not answer"
  die "${#fit[@]} of ${#all[@]} nodes are fit, the stage needs ${NODES[-1]} or more; leave out unfit ones with" \
    "'exclude' in the profile"
}

# Prints the first node of the job that is gone, if one is. SLURM itself may take minutes to notice.
lost_node() {
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    if ! timeout 60 srun --overlap --mem=0 --nodelist="$node" --nodes=1 --ntasks=1 true &>/dev/null; then
      echo "$node"
      return
    fi
  done
  return 1
}

# requeue WHY: has the job queued again.
requeue() {
  [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ] || die "$1, but it was queued again $MAX_REQUEUES times before"
  say "$1: goes back into the queue as job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || die "cannot be queued again"
  sleep 300 # until SLURM ends this
}

# finish STATUS: ends the job as the stage ended, or has it queued again.
finish() {
  local node
  [ "$1" != 0 ] || exit 0
  if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
    # A node that failed, a preemption, a time limit, scancel.
    say "SLURM has ended this start of job $SLURM_JOB_ID; sacct says why, and whether it starts again"
    exit "$1"
  fi
  case $1 in
    75) requeue "saved a checkpoint" ;;
    138) requeue "SIGUSR1 came before training began" ;;
    *)
      if node=$(lost_node); then requeue "node $node does not answer"; fi
      die "exit status $1"
      ;;
  esac
}

# run_ranks PROGRAM: runs a program of the repository as the ranks of the job.
run_ranks() {
  local status=0
  check_nodes
  step "$FIT" "$RANKS" "$ROOT/cluster/rank.sh" python "$ROOT/$1" --config "$CONFIG" || status=$?
  finish "$status"
}
