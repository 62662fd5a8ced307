"""What the site needs besides the pages: the benchmarks' pictures, and the list of settings from the code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Pages show pictures from ``benchmarks/results``, which lies beside ``docs``."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        files.append(File.generated(config, f"benchmarks/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Paths that are right in a checkout, as they are in the site."""
    markdown = markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
    return markdown.replace("<!-- settings -->", _settings()) if "<!-- settings -->" in markdown else markdown


def _settings() -> str:
    from fednano.federation.config import RunConfig

    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for spec in dataclasses.fields(RunConfig):
        default = "" if spec.default == "" else f"`{spec.default}`"
        meaning = str(spec.metadata["help"]).replace("|", "\\|")
        lines.append(f"| `{spec.name.replace('_', '-')}` | {default} | {meaning} |")
    return "\n".join(lines)
