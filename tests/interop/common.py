"""What these scripts share: the worker's own contract, compiled from proto/, and
how checks are reported."""

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


class Report:
    """Prints one row a check, and counts."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name, good, detail=""):
        self.passed += bool(good)
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'}  {name}{'  ' + str(detail) if detail != '' else ''}")

    def end(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(self.failed > 0)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
