import os, time

os.environ["PYTHONPATH"] = "/tmp/work/wt/security"
os.environ["RAYTRAIN2P_CACHE"] = "/tmp/work/cache"


def pytest_configure(config):
    if len(config.args) == 3 and "test_open_ports" in config.args[0]:
        os.environ["RAYTRAIN2P_CHAOS_TABLE"] = "/tmp/work/security/table.json"
        config.option.maxfail = 0
        config.args[:] = [
            "tests/launch/test_open_ports.py",
            "tests/launch/test_two_nodes.py::test_what_listens_beyond_loopback_demands_a_token_or_shows_metrics_alone",
            "tests/test_third_modality.py",
            "tests/launch/test_secrets_of_a_launch.py",
        ]


def pytest_collection_modifyitems(items):
    slow = [i for i in items if "another_token" in i.name]
    for i in slow:
        items.remove(i)
    items += slow


def pytest_runtest_logreport(report):
    with open("/tmp/work/security/live.log", "a") as f:
        f.write(f"{time.strftime('%H:%M:%S')} {report.when} {report.nodeid} {report.outcome} {report.duration:.1f}\n")
        if report.failed:
            f.write(str(report.longrepr)[-6000:] + "\n")
