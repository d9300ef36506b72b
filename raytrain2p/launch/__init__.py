"""A launch: the driver, its Ray cluster, and what it prints."""

import os

# Read by Ray while it is imported or started; what the user has set stays.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives `ray.shutdown` must not start another Ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Without it Ray replaces 127.0.0.1 by the machine's address in the network, even on Linux, and then listens on all interfaces.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # a launch ends this long after its last report; Ray's default: 2 s
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a notice about CUDA_VISIBLE_DEVICES
# Ray Train's controller runs in the driver, whose handlers it would close.
os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
# Each of Ray's helper processes wakes up a hundred times a second; these two are not used.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
PROGRAM_BARS = os.environ.get("TQDM_DISABLE")  # of the program that imports this
os.environ.setdefault("TQDM_DISABLE", "1")  # progress is shown by launch/progress.py
