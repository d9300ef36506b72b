#!/usr/bin/env bash
# Start a second Ray node on this machine and join it to the head of cluster/head.sh: two nodes without a second machine.
#
#   cluster/node.sh [HEAD_ADDRESS] [options of `ray start`]     (default 127.0.0.2:6379)
#
# 127.0.0.3 is an address of its own, so that Ray and the workers see two nodes.
set -euo pipefail
head="${1:-127.0.0.2:6379}"
shift || true
export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# The agent takes a free port: the head's agent may use the default one.
exec ray start --block --address="$head" --node-ip-address=127.0.0.3 --dashboard-agent-listen-port=0 --disable-usage-stats "$@"
