#!/usr/bin/env bash
# Start a second Ray node on this machine and join it to a head: two nodes without a second machine.
#
#   cluster/head.sh --node-ip-address=127.0.0.2
#   cluster/node.sh [HEAD_ADDRESS] [options of `ray start`]     (default 127.0.0.2:6379)
#
# 127.0.0.3 is an address of its own, so that Ray and the workers see two nodes. It needs the head's token, and listens as the head does.
set -euo pipefail
head="${1:-127.0.0.2:6379}"
shift || true
export RAYTRAIN2P_HOME="${RAYTRAIN2P_HOME:-$PWD}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1  # cluster/head.sh and launches set 0, with which Ray joins no other node
# The agent takes a free port: the head's agent may use the default one.
exec ray start --block --address="$head" --node-ip-address=127.0.0.3 --dashboard-agent-listen-port=0 --disable-usage-stats "$@"
