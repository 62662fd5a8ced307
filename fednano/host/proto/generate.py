"""Generate the Python code of ``language_host.proto`` next to it.

Usage: ``python fednano/host/proto/generate.py [ROOT]``, with the grpcio-tools of ``constraints.txt``. ROOT is where to
write (default: this checkout). The result is committed; a test regenerates it and compares bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROTO = "fednano/host/proto/language_host.proto"
CHECKOUT = Path(__file__).resolve().parents[3]


def generate(root: Path) -> list[Path]:
    """Write ``language_host_pb2.py``, its stub, and ``language_host_pb2_grpc.py`` below ``root``.

    The proto is named by its path from the checkout, so that generated code imports its sibling as
    ``fednano.host.proto.language_host_pb2``, which works inside the package.

    Returns:
        The files written.

    Raises:
        RuntimeError: protoc failed; it has printed why.
    """
    import grpc_tools  # type: ignore[import-untyped]
    from grpc_tools import protoc

    root.joinpath(PROTO).parent.mkdir(parents=True, exist_ok=True)
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{CHECKOUT}", f"-I{well_known}", *outputs, PROTO]) != 0:
        raise RuntimeError(f"protoc could not generate code for {PROTO}")
    stem = root / PROTO.removesuffix(".proto")
    written = [stem.with_name("language_host_" + end) for end in ("pb2.py", "pb2.pyi", "pb2_grpc.py")]
    for path in written[1:]:
        path.write_text("# mypy: ignore-errors\n" + path.read_text())  # neither is written for --strict
    return written


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT):
        print(path)
