#!/usr/bin/env bash
# A Slurm of one node on 127.0.0.1, all of it in one folder, for the tests: neither systemd nor
# cgroups nor an accounting database is needed, and nothing outside of FOLDER is touched.
#   slurm_up.sh FOLDER [CONTROLLER_PORT NODE_PORT]    then: . FOLDER/env; sinfo
#   slurm_down.sh FOLDER                              ends it and its jobs
# Needs root, as slurmd starts jobs for any user, and Debian's packages slurm-wlm and munge.
set -euo pipefail
folder=$(realpath -m "$1") controller_port=${2:-6817} node_port=${3:-6818}
node=$(hostname -s)
mkdir -p "$folder"/{bin,jobs,state}
chmod 755 "$folder"

# Who may talk to the daemons: whoever can have a credential signed with this key.
install -d -m 700 "$folder/munge"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"
# force: a temporary folder may lie in one that others can write to
munged --force --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" \
    --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" 2>> "$folder/munged.log"

cat > "$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job has to wait, 120 s by default
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/jobs
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# eight jobs at a time, of any size, on whatever machine this is
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=1
KillWait=5
MinJobAge=3600
NodeName=$node NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=tests Nodes=$node Default=YES MaxTime=INFINITE
CONF

# Without accounting Debian's sacct says nothing, and submitit, which asks it, waits for ever for
# a job that was killed. This one answers its question (JobID, State, NodeList) from scontrol.
cat > "$folder/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
echo "JobID|State|NodeList"
while (($#)); do
    if [[ $1 == -j ]]; then
        shift
        scontrol --oneliner show job "$1" 2> /dev/null | sed -nE \
            's/^JobId=([0-9]+) .*\bJobState=([A-Z_]+) .*\bNodeList=([^ ]*).*/\1|\2|\3/p'
    fi
    shift
done
SACCT
chmod 755 "$folder/bin/sacct"
printf 'export SLURM_CONF=%q PATH=%q:"$PATH"\n' "$folder/slurm.conf" "$folder/bin" > "$folder/env"
. "$folder/env"

slurmctld
slurmd
for _ in $(seq 100); do
    if [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]]; then exit 0; fi
    sleep 0.1
done
echo "Slurm did not come up:" >&2
tail -n 20 "$folder"/*.log >&2
exit 1
