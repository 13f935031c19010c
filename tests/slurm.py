"""As much of Slurm as a job array of one node needs: sbatch, srun and sacct that run jobs on this machine."""

import os
import sys
from pathlib import Path

SBATCH = """#!/bin/sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
export SLURM_NTASKS_PER_NODE=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$1")
export SLURM_NTASKS=$SLURM_NTASKS_PER_NODE SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_JOB_NAME=csd
export SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost
(
    [ -z "$last" ] && SLURM_JOB_ID=7 sh "$1"
    for task in ${last:+$(seq 0 "$last")}; do
        SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$((100 + task)) sh "$1"
    done
    touch "$(dirname "$0")/ended"
) >/dev/null 2>&1 &
echo Submitted batch job 7
"""
SRUN = """#!/bin/sh
log=$(echo "$3" | sed "s/%A_%a/7_$SLURM_ARRAY_TASK_ID/;s/%j/7/")
while [ "$1" != "${1#-}" ]; do case $1 in --output | --error) shift 2 ;; *) shift ;; esac; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" >"$(echo "$log" | sed "s/%t/$rank/")" 2>&1 &
done
wait
"""
SACCT = """#!/bin/sh
state=RUNNING
[ -e "$(dirname "$0")/ended" ] && state=COMPLETED
echo 'JobID|State|NodeList'
for job in 7 7_0 7_1 7_2 7_3; do echo "$job|$state|localhost"; done
"""


def slurm(folder: Path) -> dict[str, str]:
    """Put them into a folder; returns the environment in which they are Slurm."""
    folder.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    path = os.pathsep.join(filter(None, sys.path))
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}
