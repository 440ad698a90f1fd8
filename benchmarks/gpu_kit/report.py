"""The results of a run as one JSON file and one Markdown page."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.gpu_kit import facts
from benchmarks.gpu_kit.context import Context, code_version, read, write
from benchmarks.gpu_kit.plan import Step

RATES = ("one at a time", "at once", "with the schema")


def write_summary(context: Context, steps: Sequence[Step], out: Path | None) -> dict[str, Any]:
    """Write ``summary.json``, which holds every step's result in full, and ``summary.md``.

    out: gets copies of both and an archive of the logs.
    """
    found = {step.name: read(context.result(step.name)) for step in steps}
    made = {path.stem: read(path) for path in sorted(context.made.glob("*.done"))}
    summary = {
        "dry_run": context.dry,
        "code": code_version(),
        "machine": facts.machine(),
        "sizes": context.sizes.to_json(),
        "made": made,
        "steps": found,
    }
    write(context.results / "summary.json", summary)
    page = context.results / "summary.md"
    page.write_text(_page(summary, steps))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "summary.md"):
            shutil.copy(context.results / name, out / name)
        with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
            archive.add(context.results / "logs", "logs")
    return summary


def _page(summary: dict[str, Any], steps: Sequence[Step]) -> str:
    machine = summary["machine"]
    title = (
        "# A dry run of the GPU kit: no GPU, tiny sizes, no measurement"
        if summary["dry_run"]
        else "# GPU kit"
    )
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    lines = [
        title, "",
        f"{machine['date']}, GPU: {machine['gpu'].strip() or 'none'}. {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB. {versions}. Code {summary['code']}.", "",
        markdown([_row(step, summary["steps"][step.name]) for step in steps]), "",
    ]  # fmt: skip
    rates = list(_rates(summary["steps"]))
    if rates:
        lines += ["## Load", "", markdown(rates), ""]
    for step in steps:
        lines += _details(step, summary["steps"][step.name])
    return "\n".join(lines) + "\n"


def _row(step: Step, result: dict[str, Any] | None) -> dict[str, Any]:
    result = result or {"status": "not run"}
    return {
        "part": step.part,
        "step": step.name,
        "checks": step.checks,
        "result": result["status"],
        "s": result.get("seconds", ""),
        "limit s": step.limit_s,
    }


def _rates(results: dict[str, Any]) -> Any:
    for name, result in results.items():
        figures = (result or {}).get("figures", {})
        for kind in RATES:
            if "requests/s" in figures.get(kind, {}):
                one = dict(figures[kind])
                first = one.pop("first token ms")
                note = " (reference engine)" if "dry run" in figures else ""
                yield {"step": name + note, "load": kind, "first token ms": first["median"],
                       "first token p90": first["p90"], **one}  # fmt: skip


def _details(step: Step, result: dict[str, Any] | None) -> list[str]:
    """Checks, and what went wrong."""
    if not result or not (result.get("checks") or result.get("failure")):
        return []
    lines = [f"## {step.name}", ""]
    if result.get("checks"):
        shown = [
            {"what": one["what"], "measured": one["measured"], "wanted": one["wanted"],
             "right": {True: "yes", False: "**no**", None: "not judged in a dry run"}[one["right"]]}
            for one in result["checks"]
        ]  # fmt: skip
        lines += [
            markdown([{name: _flat(value) for name, value in row.items()} for row in shown]),
            "",
        ]
    if result.get("failure"):
        lines += [f"**{result['status']}**: {_flat(result['failure']['message'])[:600]}", ""]
    return lines


def _flat(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())[:200]
