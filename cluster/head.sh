#!/usr/bin/env bash
# Start a Ray head on this machine, for `ray job submit` and for launches from any terminal. Ctrl-C or SIGTERM stops it.
#
#   cluster/head.sh [options of `ray start`]
#   RAYTRAIN2P_HOME   where jobs keep checkpoints/ and mlflow.db (default: the current directory)
#
# Authentication is off, and jobs and drivers must set the same: RAY_AUTH_MODE=disabled. The node's address is a loopback one, but some
# of Ray's services listen on all interfaces: use it on a machine that others cannot reach, or set RAY_AUTH_MODE=token.
set -euo pipefail
export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# `ray job stop` kills after 3 seconds by default; a launch needs time to finish its step and write a checkpoint.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-90}"
# The dashboard gives jobs to an agent of the node. If the agent's default port, 52365, is in use by another Ray on this machine, it
# does not start and reports nothing, and no job ever runs ("No available agent"): so it takes a free port.
exec ray start --head --block --node-ip-address=127.0.0.2 --dashboard-agent-listen-port=0 --disable-usage-stats "$@"
