"""Find a model's files and read only the tensors that one side of the split needs.

A client must never hold the language model, not even while loading. So the safetensors index decides which shards a
side needs, only those are fetched, and only the wanted tensors are read out of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fednano.errors import ModelError

__all__ = ["EMBEDDED_MODEL", "ModelFiles", "find_model", "read_tensors"]

EMBEDDED_MODEL = "tiny"
"""Name of the small model that ships inside the package."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are.

    Attributes:
        name: what the user asked for.
        folder: local folder with at least ``config.json``.
        repository: Hub id when weights still have to be fetched from there, else ``None``.
    """

    name: str
    folder: Path
    repository: str | None = None

    def file(self, filename: str) -> Path | None:
        """Local path of ``filename``, fetched from the Hub when needed; ``None`` if the model has no such file."""
        local = self.folder / filename
        if local.is_file():
            return local
        if self.repository is None:
            return None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.repository, filename))
        except EntryNotFoundError:
            return None


def find_model(name_or_path: str) -> ModelFiles:
    """Resolve the embedded model's name, a folder, or a Hugging Face id.

    Raises:
        ModelError: nothing is found under that name; the message lists what was tried.
    """
    if name_or_path == EMBEDDED_MODEL:
        return ModelFiles(name_or_path, Path(str(resources.files("fednano.models") / "tiny")))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the folder {path} has no config.json, so it is not a Hugging Face model. "
                "Expected the files that save_pretrained writes."
            )
        return ModelFiles(name_or_path, path)
    if path.is_file():
        raise ModelError(
            f"{path} is a file; expected a model folder, a Hugging Face id, or {EMBEDDED_MODEL!r}."
        )
    return _find_on_hub(name_or_path)


def _find_on_hub(name: str) -> ModelFiles:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    advice = (
        f"no model {name!r}: it is neither {EMBEDDED_MODEL!r}, nor a folder here, nor could it be read from the "
        "Hugging Face Hub"
    )
    try:
        config = hf_hub_download(name, "config.json")
    except HFValidationError as error:
        raise ModelError(f"{advice}, because it is not a valid id. Check the path.") from error
    except Exception as error:  # the Hub client's network errors have no common base class
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{advice} ({type(error).__name__}: {reason[0] if reason else 'no details'}). "
            "Check the spelling, the network, and `hf auth login` for gated models."
        ) from error
    return ModelFiles(name, Path(config).parent, repository=name)


def _shards(files: ModelFiles, wanted: Callable[[str], bool]) -> Iterable[Path]:
    """The safetensors files that hold the wanted tensors."""
    index = files.file(_INDEX)
    if index is None:
        single = files.file(_SINGLE)
        if single is None:
            raise ModelError(
                f"weights are missing: {files.name!r} has neither {_SINGLE} nor {_INDEX}. "
                "Only safetensors are read; convert other formats with save_pretrained."
            )
        yield single
        return
    names = json.loads(index.read_text())["weight_map"]
    for shard in sorted({shard for key, shard in names.items() if wanted(key)}):
        # An index is data from outside: it must not be able to point anywhere else.
        if Path(shard).name != shard:
            raise ModelError(f"the index of {files.name!r} names {shard!r}; expected a plain file name.")
        path = files.file(shard)
        if path is None:
            raise ModelError(f"weights are missing: {files.name!r} needs {shard}, which its index names.")
        yield path


def read_tensors(files: ModelFiles, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Read the tensors whose checkpoint key satisfies ``wanted``; nothing else leaves the disk.

    Raises:
        ModelError: weights are missing or damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _shards(files, wanted):
        try:
            with safe_open(str(path), framework="pt") as handle:
                keys = [key for key in handle.keys() if wanted(key)]  # noqa: SIM118 - not a dict
                tensors.update({key: handle.get_tensor(key) for key in keys})
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read as safetensors ({error}). Fetch the model again."
            ) from error
    return tensors
