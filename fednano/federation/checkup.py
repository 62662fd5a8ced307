"""What `fednano doctor` says: does this machine, this model, this data do, and what will travel.

Nothing is trained and no weights are loaded: models are judged by their configuration, data is read as a run would
read it. A check that fails names what to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednano.errors import ConfigError, FednanoError
from fednano.federation.config import RunConfig

if TYPE_CHECKING:
    from fednano.models.vision import ImageSizes

__all__ = ["PORTS", "Check", "check_all", "check_data", "check_machine", "check_model"]

PORTS = {
    9091: "SuperLink, its server apps",
    9092: "SuperLink, its SuperNodes",
    9093: "SuperLink, flwr run",
    9094: "SuperNode, its client apps",
}
"""What Flower listens on unless told otherwise; a simulation needs none of them."""

_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SAMPLED = 64  # samples whose length is measured


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        topic: ``machine``, ``model``, ``data`` or ``wire``.
        name: what was looked at.
        status: ``ok``, ``note`` (worth knowing), or ``problem``.
        text: what was found, and for a problem what to do.
        facts: the same as numbers.
    """

    topic: str
    name: str
    status: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return asdict(self)


def check_all(config: RunConfig) -> list[Check]:
    """Every check for a run with these settings."""
    found = check_machine(config)
    model, sizes = check_model(config)
    data, lengths = check_data(config, sizes)
    return [*found, *model, *data, *_check_wire(config, sizes, lengths)]


def check_machine(config: RunConfig) -> list[Check]:
    """Versions, cores, memory, disk, GPU and ports of this machine."""
    from fednano.runs.summary import installed_versions

    versions = installed_versions()
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    found = [Check("machine", "versions", "ok", named, dict(versions))]
    memory, cores = available_memory(), os.cpu_count() or 1
    found.append(
        Check(
            "machine",
            "processor",
            "ok",
            f"{platform.machine()}, {cores} cores, {_gigabytes(memory)} of memory available",
            {"cores": cores, "memory": memory},
        )
    )
    runs = Path(config.runs_dir).absolute()
    base = next(path for path in (runs, *runs.parents) if path.exists())
    free = shutil.disk_usage(base).free
    writable = os.access(base, os.W_OK)
    text = f"{_gigabytes(free)} free for {runs}" if writable else f"{base} cannot be written. Set runs-dir."
    low = writable and free < 2**30
    status = "problem" if not writable else "note" if low else "ok"
    found.append(Check("machine", "disk", status, text + (": little" if low else ""), {"free": free}))
    return [*found, _check_gpu(config), _check_ports()]


def _check_gpu(config: RunConfig) -> Check:
    import torch

    if not torch.cuda.is_available():
        if config.device == "cuda":
            return Check(
                "machine", "gpu", "problem", "device is 'cuda', and there is no usable GPU. Set it to 'cpu'."
            )
        return Check("machine", "gpu", "note", "none: everything is computed on the processor")
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    text = f"{', '.join(names)}, {_gigabytes(free)} of {_gigabytes(total)} free on the first"
    return Check("machine", "gpu", "ok", text, {"names": names, "free": free, "total": total})


def _check_ports() -> Check:
    taken = [port for port in PORTS if not port_free(port)]
    if not taken:
        listed = ", ".join(str(port) for port in PORTS)
        return Check(
            "machine", "ports", "ok", f"{listed} are free (a deployment on this machine)", {"taken": []}
        )
    text = "; ".join(f"{port} is taken ({PORTS[port]})" for port in taken)
    return Check("machine", "ports", "note", f"{text}. A simulation needs none of them.", {"taken": taken})


def port_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def available_memory() -> int:
    """Bytes of memory that this process could still use, by what the system says; 0 where it says nothing."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def check_model(config: RunConfig) -> tuple[list[Check], dict[str, int]]:
    """What of a model stands where, whether it fits, and what an update weighs; and its sizes, empty if it does not."""
    from fednano.models.load import count_parameters

    try:
        counted = count_parameters(config.model)
        width, image_tokens, trained = _shape(config)
    except FednanoError as error:
        return [Check("model", "split", "problem", str(error))], {}
    edge, whole = counted["edge"], counted["model"]
    sizes = {
        "model": whole,
        "edge": edge,
        "language": whole - edge,
        "width": width,
        "image_tokens": image_tokens,
        "trained": trained,
    }
    text = (
        f"{config.model}: {whole:,} parameters; clients hold {edge:,} ({_gigabytes(4 * edge)} as float32), the host "
        f"the other {whole - edge:,} ({_gigabytes(4 * (whole - edge))})"
    )
    found = [Check("model", "split", "ok", text, sizes)]
    memory = available_memory()
    need = {
        "a client": 4 * edge,
        "the host": 4 * (whole - edge),
        "all of a simulation": 4 * (edge * 2 + whole),
    }
    for name, size in need.items():
        fits = not memory or size < 0.9 * memory
        text = f"{name} needs {_gigabytes(size)} for weights; {_gigabytes(memory)} are available here"
        if not fits:
            text += ": that part must run elsewhere"
        found.append(
            Check(
                "model", f"fits {name}", "ok" if fits else "note", text, {"needs": size, "available": memory}
            )
        )
    text = f"{config.adapter} trains {trained:,} parameters on {' and '.join(config.stream_names)} of width {width}"
    return [*found, Check("model", "adapter", "ok", text, {"trained": trained})], sizes


def _shape(config: RunConfig) -> tuple[int, int, int]:
    """Width of the embeddings, tokens of an image (0: takes none; of one of 448 x 448 pixels where they vary), and
    trained parameters of the adapters.

    Raises:
        ConfigError: the adapters do not fit the model.
    """
    from PIL import Image
    from transformers import AutoConfig

    from fednano.adapters import Adapter
    from fednano.federation.model import build_adapter
    from fednano.models.edge import NanoEdge
    from fednano.models.files import find_model
    from fednano.models.vision import token_count

    read = AutoConfig.from_pretrained(str(find_model(config.model).folder))
    text = read.get_text_config()
    vision, sizes = getattr(read, "vision_config", None), _image_sizes(config)
    tokens = 0 if sizes is None else token_count(sizes.of(Image.new("RGB", (448, 448))))
    if vision is None and "image" in config.stream_names:
        raise ConfigError(
            f"streams is {config.streams!r}, and {config.model} takes no images. Set streams to 'text'."
        )
    adapter: Adapter = build_adapter(config)
    leaves = adapter.leaves(NanoEdge.site("text", text.hidden_size))
    each = sum(leaf.numel for leaf in leaves.values() if leaf.role in ("shared", "personal"))
    return (
        text.hidden_size,
        tokens,
        each * len(config.stream_names),
    )


def _image_sizes(config: RunConfig) -> ImageSizes | None:
    """Of the model, or ``None`` if it takes no images."""
    from fednano.models.files import find_model
    from fednano.models.load import load_image_processor, read_config
    from fednano.models.vision import ImageSizes

    files = find_model(config.model)
    read = read_config(files)
    if getattr(read, "vision_config", None) is None:
        return None
    return ImageSizes(read, load_image_processor(files) if ImageSizes.vary(read) else None)


def check_data(config: RunConfig, sizes: dict[str, int]) -> tuple[list[Check], list[int]]:
    """Both splits as a run would read them, and the token counts of some training samples."""
    from fednano.data import KINDS
    from fednano.federation.marking import metric_of
    from fednano.federation.model import divide, load_data

    found: list[Check] = []
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = data = load_data(config, split)
        except FednanoError as error:
            found.append(Check("data", split, "problem", str(error)))
            continue
        bad = len(data.bad_rows)
        text = f"{len(data):,} samples of {data.kind}"
        if bad:
            text += f"; {bad} rows left out, first {data.bad_rows[0]}"
        facts = {
            "samples": len(data),
            "kind": data.kind,
            "bad_rows": [str(row) for row in data.bad_rows[:20]],
        }
        found.append(Check("data", split, "note" if bad else "ok", text, facts))
    train = splits.get("train")
    if train is None:
        return found, []
    if "test" in splits:
        metric = metric_of(config.metric, splits["test"])
        found.append(Check("data", "metric", "ok", f"answers are judged by {metric}", {"metric": metric}))
    if KINDS[train.kind].classes:
        counts = Counter(train.labels)
        most = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(5))
        found.append(
            Check(
                "data",
                "answers",
                "ok",
                f"{len(counts):,} different; most often {most}",
                {"different": len(counts)},
            )
        )
    try:
        parts = divide(config, train, config.clients)
        own = [len(part) for part in parts]
        text = f"{config.partition} over {config.clients} clients: {min(own):,} to {max(own):,} samples each"
        found.append(Check("data", "partition", "ok", text, {"samples": own}))
    except FednanoError as error:
        found.append(Check("data", "partition", "problem", str(error)))
    return found, _lengths(config, train, sizes, found)


def _lengths(config: RunConfig, data: Sequence[Any], sizes: dict[str, int], found: list[Check]) -> list[int]:
    """Tokens of some samples with their images; a finding about what the model cannot take."""
    if not sizes:
        return []
    from fednano.data import decode_image
    from fednano.models.files import find_model
    from fednano.models.load import read_config
    from fednano.models.prompt import build_prompt, load_text_processor
    from fednano.models.vision import Unfold, image_place, token_count

    chosen = [
        data[place * len(data) // min(_SAMPLED, len(data))] for place in range(min(_SAMPLED, len(data)))
    ]
    images = sum(sample.image is not None for sample in chosen)
    if images and not sizes["image_tokens"]:
        found.append(
            Check("data", "images", "problem", f"the data has images, and {config.model} takes none.")
        )
    try:
        tokenizer = load_text_processor(find_model(config.model))
    except FednanoError as error:
        found.append(Check("model", "tokenizer", "problem", str(error)))
        return []
    images_of = _image_sizes(config)
    place = None
    if images_of is not None:
        place = image_place(read_config(find_model(config.model)), tokenizer, config.model)
    lengths, unknown, total = [], 0, 0
    for sample in chosen:
        text = (sample.question, sample.answer)
        shown = sample.image is not None and images_of is not None
        prompt = build_prompt(tokenizer, place, *text, image=shown, history=sample.history)
        ids, more = prompt.ids + prompt.answer, 0
        if images_of is not None and place is not None and sample.image is not None:
            shape = images_of.of(decode_image(sample.image))
            ids = Unfold(tokenizer, place)(prompt.ids, shape) + prompt.answer
            more = token_count(shape) - ids.count(place.token_id)  # for its placeholders
        unknown += sum(token == tokenizer.unk_token_id for token in ids)
        total += len(ids)
        lengths.append(len(ids) + more)
    if total and unknown / total > 0.1:
        told = f"{config.model} does not know {100 * unknown / total:.0f} % of the words. Choose a model that does."
        found.append(Check("data", "words", "note", told, {"unknown": unknown / total}))
    return lengths


def _check_wire(config: RunConfig, sizes: dict[str, int], lengths: list[int]) -> list[Check]:
    """Bytes that travel: of adapters in a round, of activations in a step and in the whole run."""
    if not sizes:
        return []
    update = 4 * sizes["trained"]
    found = [
        Check(
            "wire",
            "adapters",
            "ok",
            f"{_bytes(update)} a client and round each way, "
            f"{_bytes(2 * update * config.clients * config.rounds)} in all",
            {"each_way": update},
        )
    ]
    if lengths and config.placement == "split":
        number = _NUMBER_BYTES[config.wire_dtype]
        mean = sum(lengths) / len(lengths)
        up = mean * sizes["width"] * number
        if config.exchange == "factored":
            up = config.rank * (mean + sizes["width"]) * number  # see docs/architecture.md
        run = 2 * up * config.samples * config.clients * config.rounds
        sign = "less than" if config.wire_lossless else "about"
        text = (
            f"{sign} {_bytes(up)} a sample and step each way ({mean:.0f} tokens of width {sizes['width']}, "
            f"{config.wire_dtype}, exchange {config.exchange}), {_bytes(run)} in {config.rounds} rounds"
        )
        found.append(Check("wire", "activations", "ok", text, {"up": up, "run": run, "tokens": mean}))
    return found


def _bytes(count: float) -> str:
    from fednano.runs.text import format_bytes

    return format_bytes(count)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else _bytes(count)
