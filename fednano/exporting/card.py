"""The README that goes with an export: what it is, how it was made, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fednano import __version__
from fednano.adapters import ExportedSite
from fednano.federation.config import RunConfig

__all__ = ["model_card"]

_USE = {
    "peft": """from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("{model}")
model = PeftModel.from_pretrained(base, "PATH/OF/THIS/FOLDER")""",
    "merged": """from transformers import LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("PATH/OF/THIS/FOLDER")""",
    "safetensors": """from safetensors.torch import load_file

leaves = load_file("PATH/OF/THIS/FOLDER/adapter.safetensors")  # the configuration is in adapter.json""",
}


def model_card(
    kind: str, config: RunConfig, summary: Mapping[str, Any], sites: Sequence[ExportedSite]
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        kind: of the export.
        config: the run's settings.
        summary: the run's ``summary.json``; may be empty.
        sites: what a PEFT export changed.
    """
    front = {
        "base_model": config.model,
        "library_name": {"peft": "peft", "merged": "transformers"}.get(kind, "fednano"),
        "tags": ["federated-learning", "fednano", config.adapter],
        "datasets": [config.dataset],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# {config.model} tuned on {config.dataset} by {config.clients} sites",
        "",
        f"Adapter `{config.adapter}` (rank {config.rank}, streams {config.streams}), merged by `{config.rule}` over "
        f"{summary.get('rounds', config.rounds)} rounds, seed {config.seed}, with fednano {__version__}. "
        "The sites' data did not leave them.",
        "",
    ]
    accuracy = summary.get("accuracy") or {}
    if accuracy:
        lines += ["| | accuracy |", "|---|---|"]
        lines += [f"| {name.replace('_', '-')} | {value:.1%} |" for name, value in accuracy.items()]
        lines += ["", f"Exact match over {summary.get('test_samples', 'the')} test questions.", ""]
    if sites:
        lines += ["## What is changed", "", *(f"- {site}" for site in sites), ""]
    lines += ["## Use", "", "```python", _USE[kind].format(model=config.model), "```", ""]
    return "\n".join(lines)
