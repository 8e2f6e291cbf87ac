#!/usr/bin/env bash
# A whole SLURM on this machine, for the tests: its own munge, one controller, NODES virtual nodes of 2 CPUs and a stand-in GPU.
#
#   slurm.sh start DIR [NODES]    afterwards: export SLURM_CONF=DIR/slurm.conf
#   slurm.sh stop DIR             ends what start has started; twice is fine
#
# Needs root, slurmctld, slurmd and munged, and no systemd. Everything that it writes is in DIR, ports are taken where they are free,
# and a SLURM or munge that runs already is left alone. Used by tests/test_slurm.py.
set -euo pipefail
shopt -s nullglob
[[ $# -ge 2 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
action=$1 dir=$2 nodes=${3:-1}
export SLURM_CONF=$dir/slurm.conf

free_ports() {  # $1 ports of 127.0.0.1 that nobody listens on, one a line
    python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(sock.getsockname()[1] for sock in held), sep="\n")
PYTHON
}

settings() {
    local host ports i
    host=$(hostname -s)
    mapfile -t ports < <(free_ports $((nodes + 1)))
    cat <<CONF
ClusterName=labkit-tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
# no cgroups, no accounts: processes are followed by their parents, memory and cores are on trust
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
# quick decisions, and a killed job is gone in seconds
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=5
InactiveLimit=0
MinJobAge=300
ReturnToService=2
CONF
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i]}" \
            "CPUs=2 CoresPerSocket=2 RealMemory=8000 Gres=gpu:1 State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
}

start() {
    local i
    mkdir -p "$dir/state"
    chmod 755 "$dir"
    settings > "$dir/slurm.conf"
    printf 'AutoDetect=off\nName=gpu File=/dev/null\n' > "$dir/gres.conf"
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
    # --force: the folders above DIR may be ones that munge frowns on, as those of a test are
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    slurmctld -c
    for ((i = 1; i <= nodes; i++)); do slurmd -N "n$i"; done
    for ((i = 0; i < 120; i++)); do
        [[ $(sinfo --noheader --format=%T 2>/dev/null | sort -u) == idle ]] && return 0
        sleep 0.25
    done
    echo "SLURM did not come up in 30 s:" >&2
    sinfo >&2 || true
    tail -n 20 "$dir"/*.log >&2
    return 1
}

stop() {
    local pids=() file pid i
    for file in "$dir"/{slurmd-*,slurmctld,munged}.pid; do [[ -s $file ]] && pids+=("$(<"$file")"); done
    [[ ${#pids[@]} -gt 0 ]] || return 0
    scancel --user="$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 40; i++)); do  # the controller ends the jobs; without it they would live on
        [[ -z $(squeue --noheader 2>/dev/null) ]] && break
        sleep 0.25
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for ((i = 0; i < 40; i++)); do
        kill -0 "${pids[@]}" 2>/dev/null || break
        sleep 0.25
    done
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    rm -f "$dir"/*.pid
}

case $action in
    start) start || { stop; exit 1; } ;;
    stop) stop ;;
    *) echo "start or stop, not $action" >&2; exit 2 ;;
esac
