"""The client's part of a model as a folder of its own: what a site needs, and no layer of the language model.

A checkpoint of a large model lies in a few files of gigabytes, and encoder and token table are spread over them. A site
that reads them from there has the whole model on its disk. The operator, who has it anyway, writes the part once and
sends it to the sites. Its tensors, and so its fingerprint, are those of the checkpoint.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from fednano.errors import ModelError
from fednano.models.files import ModelFiles, find_model, read_tensors
from fednano.models.load import edge_keys, head_keys, load_edge, read_config

__all__ = ["MANIFEST", "find_client_part", "write_client_part"]

MANIFEST = "client-part.json"
"""In the folder of a part: whose it is."""
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Configuration, tokenizer, image processor."""
_WEIGHTS = "model.safetensors"


def write_client_part(model: str, folder: Path, *, head: bool = False) -> dict[str, str | int]:
    """Write encoder, connector and token table of a model, with its tokenizer and processors, into a new folder.

    Args:
        model: ``"tiny"``, a folder, or a Hugging Face id.
        folder: is made; must not exist yet.
        head: with the head of the language model, which clients of the label-private exchange hold as well.

    Returns:
        The manifest: ``model``, ``fingerprint`` of the edge, ``bytes`` of the weights, ``head``.

    Raises:
        ModelError: the model cannot be read or divided, or the folder exists.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; name a folder that is to be made.")
    files = find_model(model)
    config = read_config(files)
    wanted = [edge_keys(config), *([head_keys(config)] if head else [])]
    tensors = read_tensors(files, lambda key: any(each(key) for each in wanted))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        part = Path(made) / folder.name
        part.mkdir()
        for companion in _companions(files):
            shutil.copyfile(companion, part / companion.name)
        save_file(tensors, part / _WEIGHTS, metadata={"format": "pt"})
        manifest: dict[str, str | int] = {
            "model": model,
            "fingerprint": load_edge(str(part)).fingerprint,  # also shows that it is whole
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "head": int(head),
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        part.rename(folder)
    return manifest


def find_client_part(models: Path, model: str) -> str:
    """The folder that holds a site's part of a model.

    Args:
        models: a part, or a folder of several.
        model: what the run calls its model.

    Raises:
        ModelError: there is none.
    """
    if (models / MANIFEST).is_file():
        return str(models)
    named = {_model_of(path): path.parent for path in sorted(models.glob(f"*/{MANIFEST}"))}
    if model not in named:
        raise ModelError(
            f"the run's model is {model!r}; {models} holds the client's part of {', '.join(named) or 'no model'}. Ask "
            f"the operator for it (fednano deploy edge {model} FOLDER), and put that folder there."
        )
    return str(named[model])


def _model_of(manifest: Path) -> str:
    try:
        return str(json.loads(manifest.read_text())["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{manifest} cannot be read ({error}). Get the folder again.") from error


def _companions(files: ModelFiles) -> list[Path]:
    """The small files beside the weights."""
    folder = files.folder
    if files.repository is not None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(files.repository, allow_patterns=list(_COMPANIONS)))
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name != MANIFEST
        and not path.name.endswith(".index.json")
        and any(fnmatch.fnmatch(path.name, pattern) for pattern in _COMPANIONS)
    ]
