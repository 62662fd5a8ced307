"""Make the tiny multimodal model that comes with fednano.

    python simulations/pretrain_tiny.py --out DIR            # the whole training, some 15 minutes on one CPU thread
    python simulations/pretrain_tiny.py --out DIR --smoke    # a few steps, to see that it works
    python simulations/pretrain_tiny.py --out DIR --keep F   # keep the state between the two stages in the file F,
                                                             # and start from it if it is there
    python simulations/pretrain_tiny.py --verify DIR         # does the folder's file have the recorded hash?

The model is a LLaVA of 3 million parameters in Hugging Face's own classes. It is trained on pictures and questions
that `simulations/pretraining/` draws and words itself. easy-VQA, on which the model is tuned later, is used for nothing
but one measurement at the end. The same seed on the same versions and the same kind of machine gives the same file;
`pretraining.json` in the folder records all of these, and the hash.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from pretraining.evaluate import own_accuracy, zero_shot
from pretraining.lean import keep_memory
from pretraining.network import build_model, save
from pretraining.stages import PatchReader, Schedule, train_encoder, train_language
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

__all__ = ["FULL", "SMOKE", "Recipe", "main", "make", "pretrain", "weights_hash"]

_THREADS = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The two stages and how many easy-VQA questions are asked at the end (None: all 9,673)."""

    encoder: Schedule
    language: Schedule
    questions: int | None = None


FULL = Recipe(
    encoder=Schedule(steps=2500, batch=64, rate=1e-3), language=Schedule(steps=1600, batch=32, rate=7e-4)
)
SMOKE = Recipe(
    encoder=Schedule(steps=4, batch=8, rate=1e-3, warmup=2),
    language=Schedule(steps=3, batch=4, rate=1e-3, warmup=2),
    questions=20,
)


def _first_stage(
    model: LlavaForConditionalGeneration,
    reader: PatchReader,
    recipe: Recipe,
    seed: int,
    report: Callable[[str], None],
    keep: Path | None,
) -> None:
    """Train the encoder, or take it from the file ``keep`` if an equal run left it there."""
    both = torch.nn.ModuleList([model, reader])
    made_by = {"made_by": json.dumps([dataclasses.asdict(recipe.encoder), seed, _versions(), _machine()])}
    if keep is not None and keep.is_file():
        with safetensors.safe_open(keep, framework="pt") as kept:
            if kept.metadata() != made_by:
                raise SystemExit(
                    f"--keep {keep}: the file comes from another seed, recipe, version or machine "
                    f"({kept.metadata()}); name another file, or delete it"
                )
        both.load_state_dict(load_file(keep))
        report(f"encoder: taken from {keep}")
        return
    train_encoder(model, reader, recipe.encoder, seed, report)
    if keep is not None:
        save_file(both.state_dict(), keep, metadata=made_by)


def pretrain(
    recipe: Recipe, seed: int, report: Callable[[str], None], keep: Path | None = None
) -> LlavaForConditionalGeneration:
    """Train a model from nothing; the global random state and the number of threads are left as they were.

    Args:
        keep: file for the state between the stages; used if it is there, written if not.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(_THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(seed)
            reader = PatchReader(model.config.vision_config.hidden_size)
        _first_stage(model, reader, recipe, seed, report, keep)
        train_language(model, reader, recipe.language, seed, report)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
    return model.eval()


def weights_hash(folder: Path) -> str:
    """SHA-256 of the folder's ``model.safetensors``, in hex."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "amx_tiles": bool(torch.cpu._is_amx_tile_supported()),
        "threads": _THREADS,
    }


def _versions() -> dict[str, str]:
    modules = (np, safetensors, tokenizers, torch, transformers)
    return {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules}


def make(
    folder: Path, recipe: Recipe, seed: int, report: Callable[[str], None], keep: Path | None = None
) -> dict[str, Any]:
    """Train, write the model's folder with its ``pretraining.json``, measure; returns what the record holds."""
    begun, used = time.perf_counter(), time.process_time()
    model = pretrain(recipe, seed, report, keep)
    seconds = {"wall": round(time.perf_counter() - begun, 1), "cpu": round(time.process_time() - used, 1)}
    save(model, folder)
    # What is measured is what was written: the stored weights, loaded as anybody would load them.
    stored = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    record = {
        "made_by": "simulations/pretrain_tiny.py",
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "versions": _versions(),
        "machine": _machine(),
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in stored.parameters()),
        "weights_sha256": weights_hash(folder),
        "measured": {
            "easy_vqa_test_zero_shot": dataclasses.asdict(zero_shot(stored, recipe.questions)),
            "own_questions": dataclasses.asdict(own_accuracy(stored, seed, recipe.questions or 2000)),
        },
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _verify(folder: Path) -> int:
    recorded = json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))["weights_sha256"]
    found = weights_hash(folder)
    print(f"recorded {recorded}\nfound    {found}\n{'same' if found == recorded else 'DIFFERENT'}")
    return int(found != recorded)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the tiny multimodal model, or check its hash.")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", type=Path, metavar="DIR", help="train and write the model's folder here")
    goal.add_argument("--verify", type=Path, metavar="DIR", help="compare the weights' hash with the record")
    parser.add_argument("--seed", type=int, default=0, help="default 0, the seed of the model in the package")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the state between the stages here")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    chosen = parser.parse_args(arguments)
    if chosen.verify is not None:
        missing = [n for n in ("pretraining.json", "model.safetensors") if not (chosen.verify / n).is_file()]
        if missing:
            parser.error(
                f"--verify {chosen.verify}: no {' and no '.join(missing)} there; name a folder made by --out"
            )
        return _verify(chosen.verify)
    if chosen.seed < 0:
        parser.error(f"--seed: got {chosen.seed}, expected 0 or more")
    keep_memory()
    recipe = SMOKE if chosen.smoke else FULL
    record = make(chosen.out, recipe, chosen.seed, lambda line: print(line, flush=True), chosen.keep)
    score = record["measured"]["easy_vqa_test_zero_shot"]
    print(f"{record['weights_sha256']}  {chosen.out / 'model.safetensors'}")
    print(f"easy-VQA zero-shot {100 * score['accuracy']:.1f} % of {score['questions']} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
