"""A CycloneDX SBOM of what the lock file installs, or of an environment that is installed.

``make sbom`` runs it with cyclonedx-bom in an environment of its own. The tool reads no version from
pyproject.toml, because ours is in the code; this adds it, and the dependencies of the project itself.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCK = "requirements.lock"


def version() -> str:
    """Version of the project."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "service" / "__init__.py").read_text())
    assert found is not None
    return found[1]


def with_root(content: dict[str, Any], project_version: str) -> dict[str, Any]:
    """The SBOM with the version of the project, and every component as something that it needs."""
    root = content["metadata"]["component"]
    root["version"] = project_version
    root["purl"] = f"pkg:pypi/{root['name']}@{project_version}"
    rows = [one for one in content["dependencies"] if one["ref"] != root["bom-ref"]]
    needed = sorted(one["bom-ref"] for one in content["components"])
    root_row = {"ref": root["bom-ref"], "dependsOn": needed}
    return {**content, "dependencies": [root_row, *rows]}


def generated(source: list[str]) -> dict[str, Any]:
    """What cyclonedx-py writes for a source."""
    # It warns of the missing dependencies of the project, which `with_root` adds.
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", "cyclonedx_py", *source]
    options = ["--pyproject", "pyproject.toml", "--output-reproducible", "--of", "JSON"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(text: str) -> None:
    """Raise ``ValueError`` where the text is not valid CycloneDX 1.6."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        raise ValueError(f"not valid CycloneDX: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--python", help="interpreter of an environment, in place of the lock file")
    options = parser.parse_args()
    source = ["environment", options.python] if options.python else ["requirements", LOCK]
    text = json.dumps(with_root(generated(source), version()), indent=1) + "\n"
    check(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    components = len(json.loads(text)["components"])
    print(f"{options.output}: valid CycloneDX 1.6, {components} components")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
