"""Lower bounds of pyproject.toml are versions that `make test-lowest` installs, and constraints.txt keeps to them."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def requirements() -> list[Requirement]:
    """What the project and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    return [Requirement(line) for line in (*project["dependencies"], *extras)]


def pins(file: str) -> dict[str, Version]:
    """Versions by name, of a file of lines NAME==VERSION."""
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    pairs = [line.split("==") for line in lines if line]
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names), f"{file} names a package twice"
    return {name: Version(version) for name, (_, version) in zip(names, pairs, strict=True)}


def test_every_lower_bound_is_the_version_that_is_tested() -> None:
    bounds = [
        (canonicalize_name(wanted.name), Version(specifier.version))
        for wanted in requirements()
        for specifier in wanted.specifier
        if specifier.operator == ">="
    ]
    lowest = pins("constraints-lowest.txt")
    assert set(bounds) == set(lowest.items())


def test_versions_tested_together_keep_to_the_bounds() -> None:
    pinned = pins("constraints.txt")
    wanted = [w for w in requirements() if canonicalize_name(w.name) in pinned]
    assert len(wanted) > len(requirements()) / 2
    assert [str(w) for w in wanted if not w.specifier.contains(pinned[canonicalize_name(w.name)])] == []
