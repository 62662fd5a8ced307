"""Files that are either whole or absent, whenever the process dies or the disk fills.

Every file is written under a temporary name in the same folder, flushed to the disk, and renamed; a rename
within one file system replaces the old file in one step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fednano.errors import RunError

__all__ = [
    "disk_advice",
    "finite",
    "inside",
    "read_json",
    "replace_file",
    "sync_folder",
    "write_bytes",
    "write_json",
]


def inside(root: Path, name: str | Path) -> Path:
    """The path of ``name`` below ``root``.

    Args:
        root: a folder.
        name: a relative path; it need not exist.

    Raises:
        RunError: ``name`` is absolute or leads outside of ``root``, also by way of a symbolic link.
    """
    base = root.resolve()
    text = str(name)
    path = (base / text).resolve() if "\0" not in text else base
    if not text or path == base or Path(text).is_absolute() or not path.is_relative_to(base):
        raise RunError(
            f"{text!r} does not name a file inside the run folder {root}. Give a relative path without '..'."
        )
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: afterwards ``path`` holds ``content``, or what it held before.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise RunError(f"Cannot write {path}: {disk_advice(path.parent, len(content), error)}") from error


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """What `write_bytes` does, for callers with an error of their own; ``mode`` is that of a new file, less the umask.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON in one step. Numbers that are not finite become null, which JSON can hold.

    Raises:
        RunError: ``value`` holds something that JSON does not know, the disk is full, or the folder cannot be
            written.
    """
    try:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"Cannot write {path}: {error}. Give strings, numbers, lists and mappings only."
        ) from error
    write_bytes(path, text.encode("utf-8", "surrogatepass") + b"\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist. Is this the folder of a run that has got so far?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} cannot be read as JSON: {error}. Restore it from a backup, or repeat the run."
        ) from error


def finite(value: object) -> object:
    """``value`` with every float that is not finite replaced by None, through lists and mappings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return  # Windows cannot open folders; it journals renames by itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_advice(folder: Path, needed: int, error: OSError) -> str:
    """What went wrong with a write of ``needed`` bytes, and what the user can do."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        return (
            f"{error.strerror or error} (needed {needed:,} bytes, {free:,} are free). "
            "Free space, or check permissions and quota, then resume the run; what was saved before is "
            "intact."
        )
    return f"{error.strerror or error}. Check that the folder exists and can be written, then resume the run."
