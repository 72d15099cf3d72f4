"""The worker's own contract, compiled from proto/ for these scripts."""

import importlib
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]


def contract():
    """The modules imagegpt_pb2 and imagegpt_pb2_grpc."""
    out = tempfile.mkdtemp()
    proto = ROOT / "proto"
    arguments = ["protoc", f"-I{proto}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    arguments += [f"--python_out={out}", f"--grpc_python_out={out}"]
    files = ["imagegpt/v1/imagegpt.proto", "google/rpc/status.proto"]
    if protoc.main(arguments + [str(proto / file) for file in files]) != 0:
        sys.exit("the contract could not be compiled")
    sys.path.insert(0, out)
    # google.rpc is in the way of googleapis-common-protos, if that is there.
    import google.rpc

    google.rpc.__path__ = [f"{out}/google/rpc", *google.rpc.__path__]
    return (
        importlib.import_module("imagegpt.v1.imagegpt_pb2"),
        importlib.import_module("imagegpt.v1.imagegpt_pb2_grpc"),
    )
