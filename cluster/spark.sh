#!/usr/bin/env bash
# A task on each node of an ETL job. All run a worker of Spark; the first also the master, and spark-submit with the
# arguments given, whose exit status is the step's.
set -euo pipefail

master=spark://$MASTER_ADDR:$MASTER_PORT
export SPARK_LOCAL_DIRS=$LOCAL_DISK/colarec-spark-$SLURM_JOB_ID-$SLURM_PROCID
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$SPARK_LOCAL_DIRS"' EXIT
mkdir -p "$SPARK_LOCAL_DIRS" "$SPARK_LOGS"

# Half of the memory is for Python workers, which no heap holds. Driver and worker of the first node share the rest, and
# all workers are alike.
memory_mb=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * CPUS))}
[ "$memory_mb" -gt 0 ] || memory_mb=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
driver_mb=$((memory_mb / 8 < 16384 ? memory_mb / 8 : 16384))
worker_mb=$((memory_mb / 2 - driver_mb))
executor_cores=$((CPUS < 16 ? CPUS : 16))
executor_mb=$((worker_mb * executor_cores / CPUS))
cores=$((CPUS * SLURM_STEP_NUM_NODES))

answers() {
  (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null
}

if [ "$SLURM_PROCID" = 0 ]; then
  spark-class org.apache.spark.deploy.master.Master --host "$MASTER_ADDR" --port "$MASTER_PORT" --webui-port 0 \
    &>"$SPARK_LOGS/master.txt" &
fi
for ((second = 0; ; second++)); do
  ! answers || break
  [ "$second" -lt 120 ] || { echo "error: Spark's master does not answer at $master" >&2 && exit 1; }
  sleep 1
done
spark-class org.apache.spark.deploy.worker.Worker --cores "$CPUS" --memory "${worker_mb}M" --webui-port 0 \
  --work-dir "$SPARK_LOGS/$(hostname)" "$master" &>"$SPARK_LOGS/worker-$(hostname).txt" &
if [ "$SLURM_PROCID" = 0 ]; then
  # The driver waits until all cores have registered, a minute at most.
  spark-submit --master "$master" --conf spark.driver.host="$MASTER_ADDR" --driver-memory "${driver_mb}m" \
    --executor-memory "${executor_mb}m" --conf spark.executor.cores=$executor_cores --conf spark.cores.max=$cores \
    --conf spark.scheduler.minRegisteredResourcesRatio=1 --conf spark.scheduler.maxRegisteredResourcesWaitingTime=60s \
    --conf spark.sql.shuffle.partitions=$((2 * cores)) "$@"
else
  while answers; do sleep 2; done
fi
