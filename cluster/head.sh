#!/usr/bin/env bash
# A Ray head on this machine, for `ray job submit` and for launches from any terminal. Ctrl-C or SIGTERM stops it.
#
#   cluster/head.sh [options of `ray start`]
#   RAYTRAIN2P_HOME   where jobs keep checkpoints/ and mlflow.db (default: the current directory)
#
# It listens on a loopback address only, so authentication is off; jobs and drivers must say the same: RAY_AUTH_MODE=disabled.
set -euo pipefail
export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# `ray job stop` kills after 3 seconds unless told otherwise: a launch finishes its step and saves first.
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-90}"
# The dashboard hands jobs to an agent of the node. On its default port, 52365, it yields without a word to any other Ray of
# this machine, and then no job is ever taken ("No available agent"): a free port instead.
exec ray start --head --block --node-ip-address=127.0.0.2 --dashboard-agent-listen-port=0 --disable-usage-stats "$@"
