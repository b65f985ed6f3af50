#!/usr/bin/env bash
# Ends what slurm_up.sh FOLDER has started, jobs first; the folder stays.
set -euo pipefail
folder=$(realpath "$1")
. "$folder/env"
scancel --full --signal=KILL --state=RUNNING 2> /dev/null || true
scancel --user=root 2> /dev/null || true
for _ in $(seq 100); do
    if [[ -z $(squeue --noheader 2> /dev/null) ]]; then break; fi
    sleep 0.1
done
for daemon in slurmd slurmctld munged; do
    pid=$(cat "$folder/$daemon.pid" 2> /dev/null || true)
    # the state that a slower end would save is of no use to anybody
    if [[ -n $pid && $(cat "/proc/$pid/comm" 2> /dev/null) == "$daemon" ]]; then kill -KILL "$pid"; fi
done
