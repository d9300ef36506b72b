"""Prints the versions of all that raytrain2p[serve,object-storage] needs, as installed here:
python cluster/image/pin.py > cluster/image/requirements.txt
"""

from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def add(name: str, extras: frozenset[str], found: dict[tuple[str, frozenset[str]], str]) -> None:
    """Add the version of a package, and of what it needs."""
    key = (canonicalize_name(name), extras)
    if key in found:
        return
    installed = distribution(name)
    found[key] = installed.version.partition("+")[0]  # the machine's own build of PyTorch, such as 2.13.0+cpu, is not the cluster's
    for requirement in map(Requirement, installed.requires or []):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            add(requirement.name, frozenset(requirement.extras), found)


if __name__ == "__main__":
    packages: dict[tuple[str, frozenset[str]], str] = {}
    add("raytrain2p", frozenset({"serve", "object-storage"}), packages)
    for line in sorted({f"{name}=={version}" for (name, _), version in packages.items() if name != "raytrain2p"}):
        print(line)
