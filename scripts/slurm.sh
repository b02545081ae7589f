#!/usr/bin/env bash
# Runs a whole stream on all nodes of a SLURM job, from the root of the project:
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm.sh ucit [options of llava-cl run]
# The nodes share the file system and reach each other by ssh without a password, see docs/running.md. Submitted again, or
# requeued by SLURM, a job goes on where the last one ended.
#SBATCH --job-name=llava-cl
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
#SBATCH --output=llava-cl-%j.log
set -euo pipefail
if [ $# -lt 1 ] || [ -z "${SLURM_JOB_NODELIST:-}" ] || [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then
    sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
hostfile=$(mktemp)
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_GPUS_ON_NODE/" > "$hostfile"
# Read by its descriptor, because after exec no shell is left to remove it.
exec 200< "$hostfile"
rm "$hostfile"
# SLURM signals this process, which must be the command. It runs a copy of this file, so the project is where the job was
# submitted.
exec bash "$SLURM_SUBMIT_DIR/scripts/train_stream.sh" "$@" --hostfile /dev/fd/200 --nproc "$SLURM_GPUS_ON_NODE"
