#!/usr/bin/env bash
# Several Ray nodes on this machine, as on several machines: each has an address, processes, a host name and a /tmp/ray of its own. All else
# of the file system is shared. Linux; neither root nor installation is needed.
#
#   cluster/local/nodes.sh up COUNT [options of `ray start`]    start COUNT nodes; node 1, 10.77.0.11, is the head
#   cluster/local/nodes.sh start NODE [options]                 start one more, or again one that was killed, with its former options
#   cluster/local/nodes.sh exec NODE COMMAND ...                run a command on a node; NODE 0 is beside them: 10.77.0.1, without Ray
#   cluster/local/nodes.sh cut NODE | join NODE                 take its network cable out, put it back
#   cluster/local/nodes.sh kill NODE                            kill all its processes at once
#   cluster/local/nodes.sh down                                 end all of it, and every command that it runs
#
#   RAYTRAIN2P_NODES   folder of the node's logs (NODE/log, NODE/ray/) (default: raytrain2p-nodes-UID in $TMPDIR or /tmp)
#   RAYTRAIN2P_HOME    where jobs keep checkpoints/ and mlflow.db (default: the current directory)
#
# Every request needs a token, as with cluster/head.sh. Neither the machine's network nor this one reaches the other.
set -euo pipefail
script="$(realpath "${BASH_SOURCE[0]}")"
state="$(realpath -m "${RAYTRAIN2P_NODES:-${TMPDIR:-/tmp}/raytrain2p-nodes-$(id -u)}")"
export RAYTRAIN2P_NODES="$state" # inside, the user is 0
network=10.77.0
head="$network.11"

main() {
    case "${1:-}" in
        up) up "${@:2}" ;;
        down) down ;;
        start | exec | cut | join | kill) beside "$@" ;;
        --beside) wait_beside ;;
        --node) run_node "${@:2}" ;;
        --inside) inside "${@:2}" ;;
        *) fail "usage:"$'\n'"$(sed -n 's/^#  *\(cluster.*\)/  \1/p' "$script")" ;;
    esac
}

runs() { # whether the process is there, and not just waiting for its parent to notice its end
    grep -q . "/proc/$1/cmdline" 2>/dev/null
}

child() {
    local children
    children="$(cat "/proc/$1/task/$1/children")" && [ -n "$children" ] && echo "${children%% *}"
}

fail() {
    echo "nodes.sh: $*" >&2
    exit 2
}

# --- on this machine

up() {
    [[ ${1:-} =~ ^[0-9]+$ ]] || fail "how many nodes? nodes.sh up COUNT"
    (umask 077 && mkdir -p "$state")
    [ -O "$state" ] || fail "$state belongs to another user: set RAYTRAIN2P_NODES to another folder"
    exec 9>>"$state/lock"
    flock -n 9 || fail "already up: nodes.sh down"
    rm -rf "${state:?}"/[0-9]*
    mkdir -p /tmp/ray # each node mounts its own over it
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(--user --map-root-user)
    trap down EXIT
    # It holds the lock (descriptor 9) as long as it lives. Its first process is 1 of its process namespace: with it end all others.
    setsid unshare "${as_root[@]}" --net --mount --pid --fork --kill-child --mount-proc "$script" --beside "$state" \
        </dev/null >"$state/log" 2>&1 &
    echo $! >"$state/pid"
    until grep -q ready "$state/log"; do
        runs $! || fail "namespaces cannot be made here: $(cat "$state/log")"
        sleep 0.1
    done
    exec 9>&-
    python -m raytrain2p.launch.ray_token
    for node in $(seq "$1"); do
        (beside start "$node" "${@:2}")
    done
    trap - EXIT
}

started() { # the process that `up` started, if it is still there
    local pid
    pid="$(cat "$state/pid" 2>/dev/null)" && grep -qzF -- "$state" "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

down() {
    local parent
    if ! parent="$(started)"; then
        echo "nodes.sh: nothing is up" >&2
        return
    fi
    kill -KILL "$(child "$parent" || echo "$parent")"
    while runs "$parent"; do sleep 0.1; done # it ends after all processes have
}

beside() { # run `inside` in the namespaces beside the nodes
    local parent first as_root=()
    if ! parent="$(started)" || ! first="$(child "$parent")"; then fail "not up: nodes.sh up COUNT"; fi
    [ "$(id -u)" = 0 ] || as_root=(--user --preserve-credentials)
    exec nsenter --target "$first" "${as_root[@]}" --net --mount --pid --wd="$PWD" "$script" --inside "$@"
}

# --- beside the nodes, as root, or as what counts as root there

wait_beside() {
    ip link set lo up
    ip link add bridge type bridge
    ip address add "$network.1/24" dev bridge
    ip link set bridge up
    echo ready
    while :; do sleep infinity; done
}

inside() {
    local node="$2" first
    [[ $node =~ ^[0-9]+$ && $node -lt 100 ]] || fail "not a node: $node"
    case "$1" in
        start) start_node "${@:2}" ;;
        cut) node_process "$node" >/dev/null && ip link set "node$node" down ;;
        join) node_process "$node" >/dev/null && ip link set "node$node" up ;;
        kill) kill_node "$node" ;;
        exec)
            export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
            if [ "$node" = 0 ]; then
                export RAY_ADDRESS="${RAY_ADDRESS:-http://$head:8265}" # of `ray job`
                exec "${@:3}"
            fi
            first="$(node_process "$node")"
            exec nsenter --target "$first" --net --mount --uts --pid --wd="$PWD" "${@:3}"
            ;;
    esac
}

kill_node() {
    local first
    first="$(node_process "$1")"
    kill -KILL "$first"
    while runs "$(cat "$state/$1/pid")"; do sleep 0.1; done
}

node_runs() { # whether a node is up; one that is just ending is not
    local pid first
    pid="$(cat "$state/$1/pid" 2>/dev/null)" && first="$(child "$pid" 2>/dev/null)" && runs "$first"
}

node_process() { # the process 1 of a node
    if ! node_runs "$1"; then fail "node $1 is not up: nodes.sh start $1"; fi
    child "$(cat "$state/$1/pid")"
}

start_node() {
    local node="$1" folder="$state/$1" pid
    if node_runs "$node"; then fail "node $node is up"; fi
    if pid="$(cat "$folder/pid" 2>/dev/null)"; then
        for _ in $(seq 100); do runs "$pid" && sleep 0.1; done # it is just ending
        if runs "$pid"; then fail "node $node is up"; fi
    fi
    rm -rf "$folder/ray" "$folder/log"
    mkdir -p "$folder/ray"
    if [ $# -gt 1 ] || [ ! -e "$folder/options" ]; then printf '%s\0' --object-store-memory=200000000 "${@:2}" >"$folder/options"; fi
    setsid unshare --net --mount --uts --pid --fork --kill-child --mount-proc "$script" --node "$node" </dev/null >"$folder/log" 2>&1 &
    pid=$!
    echo $pid >"$folder/pid"
    until child "$pid" >/dev/null; do sleep 0.1; done
    ip link delete "node$node" 2>/dev/null || true # the kernel may take a moment to delete that of a killed node
    ip link add "node$node" type veth peer name eth0 netns "$(node_process "$node")"
    ip link set "node$node" master bridge up
    for _ in $(seq 240); do
        if grep -q "Ray runtime started" "$folder/log"; then return; fi
        runs "$pid" || break
        sleep 0.5
    done
    kill -KILL "$pid" 2>/dev/null || true
    fail "node $node did not start: $(tail -n 20 "$folder/log")"
}

# --- on a node

run_node() {
    local node="$1" address="$network.$((10 + $1))" options=()
    mount --bind "$state/$node/ray" /tmp/ray
    hostname "node$node"
    ip link set lo up
    until ip link set eth0 up 2>/dev/null; do sleep 0.1; done # start_node is about to make it
    ip address add "$address/24" dev eth0
    export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
    export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-90}" # as in cluster/head.sh
    if [ "$node" = 1 ]; then
        options=(--head --dashboard-host="$address")
    else
        options=(--address="$head:6379")
    fi
    mapfile -d '' -t -O "${#options[@]}" options <"$state/$node/options"
    ray start --block --node-ip-address="$address" --disable-usage-stats "${options[@]}" &
    wait $! # bash as process 1 reaps the orphans of Ray; Ray itself would leave them
}

main "$@"
