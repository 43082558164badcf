"""The dependencies of pyproject.toml at their lower bounds, a line each, as constraints for pip."""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def main():
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.marker is None or requirement.marker.evaluate():
            [bound] = (each for each in requirement.specifier if each.operator == ">=")
            print(f"{requirement.name}=={bound.version}")


if __name__ == "__main__":
    main()
