"""Starts the kit on a machine that has the parts and nothing else: ``python3 start.py [OPTIONS]``.

Goes with the parts. Keeps those of this transfer, unpacks the project once it is there, and hands over
to ``python -m benchmarks.gpu_kit``. Needs nothing but Python.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path


def main() -> None:
    here = Path(__file__).resolve().parent
    work = Path(os.environ.get("GPU_KIT_WORK") or Path.home() / ".cache" / "gpu-kit")
    manifest = (here / "parts.json").read_text()
    parts = [one for one in json.loads(manifest)["parts"] if one["group"] == "project"]
    version = hashlib.sha256("".join(one["sha256"] for one in parts).encode()).hexdigest()[:12]
    target = work / f"project-{version}"
    if not target.is_dir():
        content = b""
        for part in parts:
            path = next(
                (p for p in (here / part["name"], work / "parts" / part["name"]) if p.is_file()),
                None,
            )
            if path is None:
                sys.exit(f"{part['name']}, which has the project, is needed first")
            piece = path.read_bytes()
            if hashlib.sha256(piece).hexdigest() != part["sha256"]:
                sys.exit(f"{path.name} is damaged: send it again")
            content += piece
        partial = work / f"project-{version}.partial"
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            archive.extractall(partial, filter="data")
        partial.rename(target)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_kit",
        "--parts",
        str(here),
        "--work",
        str(work),
    ]
    os.chdir(target)
    os.execv(sys.executable, [*command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
