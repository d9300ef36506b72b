#!/usr/bin/env bash
# Start a Ray head on this machine, for `ray job submit` and for launches from any terminal. Ctrl-C or SIGTERM stops it.
#
#   cluster/head.sh [options of `ray start`]
#   RAYTRAIN2P_HOME   where jobs keep checkpoints/ and mlflow.db (default: the current directory)
#
# Every request needs a token, which is made if there is none: ~/.ray/auth_token, or RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Launches
# find it; for `ray job submit`, set RAY_AUTH_MODE=token. All listens on loopback alone, so no node can join: give the head an address
# that others reach (`--node-ip-address`), and most of Ray listens on all interfaces (docs/security.md). Several nodes on this machine
# alone: cluster/local/nodes.sh.
set -euo pipefail
export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Without it Ray replaces 127.0.0.1 by the machine's address in the network, even on Linux.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER:-0}"
# `ray job stop` kills after 3 seconds by default; a launch needs time to finish its step and write a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-90}"
python -m raytrain2p.launch.ray_token
# The dashboard gives jobs to an agent of the node. If the agent's default port, 52365, is in use by another Ray on this machine, it
# does not start and reports nothing, and no job ever runs ("No available agent"): so it takes a free port.
exec ray start --head --block --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0 --disable-usage-stats "$@"
