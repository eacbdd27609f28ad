"""constraints.txt pins what is installed: every direct and indirect dependency, all extras included."""

import importlib.metadata as metadata
import re

from packaging.requirements import Requirement

from tests.conftest import ROOT


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(root: str, extras: tuple[str, ...]) -> set[str]:
    """Names of the distributions that `root[extras]` needs here, without itself."""
    found, waiting = set(), [(root, extras)]
    seen = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in (*wanted, "")):
                continue
            found.add(canonical(requirement.name))
            waiting.append((requirement.name, tuple(sorted(requirement.extras))))
    return found


def test_every_dependency_is_pinned_to_the_version_tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonical(name): version for name, version in pins.items()}
    needed = closure("mdt-ray", ("assets", "dev"))
    assert len(needed) > 50
    assert needed - pins.keys() == set()
    wrong = {n: (metadata.version(n), pins[n]) for n in needed if metadata.version(n).split("+")[0] != pins[n]}
    assert wrong == {}
