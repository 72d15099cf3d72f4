"""The systems that scripts/bench-peers.sh compares."""

from dataclasses import dataclass

LAYER = 16
OURS = "imagegpt"


@dataclass(frozen=True)
class System:
    """One row of the table: an engine in a precision."""

    engine: str
    precision: str
    label: str

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.precision}"

    @property
    def is_ours(self) -> bool:
        return self.engine == OURS

    @property
    def reference(self) -> str:
        """File with the answers that its own are compared with, from prepare.py."""
        return "recipe.npy" if self.engine == "recipe" else "features.npy"

    @property
    def n_layers(self) -> int:
        return 24 if self.engine == "recipe" else LAYER


ALL = [
    System("recipe", "fp32", "the model card's recipe: 24 layers, ONNX Runtime"),
    System("openvino", "fp32", "OpenVINO, fp32"),
    System("openvino", "bf16", "OpenVINO, bf16 hint"),
    System("openvino", "int8", "OpenVINO, NNCF post-training int8"),
    System("weights", "int8", "OpenVINO, NNCF weights in int8, quantizing rows as they come"),
    System("provider", "fp32", "ONNX Runtime's OpenVINO provider, fp32"),
    System("provider", "bf16", "ONNX Runtime's OpenVINO provider, bf16 hint"),
    System("torch", "fp32", "PyTorch eager, fp32"),
    System("torch", "bf16", "PyTorch eager, bf16"),
    System(OURS, "fp32", "imagegpt, fp32"),
    System(OURS, "bf16", "imagegpt, bf16"),
    System(OURS, "int8", "imagegpt, int8"),
]
# PyTorch is slow, and no peer that a worker would be replaced with.
DEFAULT = [system.name for system in ALL if system.engine != "torch"]


@dataclass(frozen=True)
class Goal:
    """Least ratio of a peer's time to ours, if there is a goal, and least cosine of our answers."""

    precision: str
    peer: str
    ratio: float | None
    cosine: float


def goals(features: set[str]) -> list[Goal]:
    """Returns the goals on a CPU with these features, by their names in /proc/cpuinfo."""
    has_amx = "amx_tile" in features
    has_vnni = bool(features & {"avx512_vnni", "avx_vnni"})
    return [
        Goal("fp32", "openvino-fp32", 1.2, 0.9999),
        Goal("bf16", "openvino-bf16", 1.2 if has_amx else 1.25, 0.9999),
        Goal("int8", "openvino-int8", 1.1, 0.9995),
        Goal("int8", "recipe-fp32", 15 if has_amx else 8 if has_vnni else None, 0.9995),
    ]
