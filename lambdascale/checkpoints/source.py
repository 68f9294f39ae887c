"""A Hugging Face model directory: config.json and one or several safetensors files."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from lambdascale.checkpoints.architecture import Architecture, load_architecture
from lambdascale.checkpoints.documents import inside, read_document
from lambdascale.checkpoints.safetensors_file import TensorInfo, read_header
from lambdascale.core import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Endings by which quantised formats call their tensors (GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8), and the files that
# describe them beside config.json.
_QUANTISED = (".qweight", ".qzeros", ".SCB", ".absmax", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2")
_DESCRIPTIONS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


class HfCheckpoint:
    """Tensors of a model directory with their files. UserError if a file is missing, unreadable or quantised.

    A directory with an index has its tensors where ``weight_map`` says, whatever else its files hold; a tensor that the index
    does not name may stand in one of them only.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
        self.directory = directory
        self.architecture: Architecture = load_architecture(directory)
        self.tensors = self._indexed() if (directory / INDEX).is_file() else self._single()
        _refuse_quantised(directory, self.tensors)

    def _single(self) -> dict[str, tuple[Path, TensorInfo]]:
        file = self.directory / SINGLE
        if not file.is_file():
            raise UserError(f"{self.directory} has neither {SINGLE} nor {INDEX}: only safetensors checkpoints are supported")
        return {name: (file, info) for name, info in read_header(file)[0].items()}

    def _indexed(self) -> dict[str, tuple[Path, TensorInfo]]:
        index = self.directory / INDEX
        if (self.directory / SINGLE).is_file():
            raise UserError(f"{self.directory} has both {SINGLE} and {INDEX}: remove the one that is not meant")
        weight_map = read_document(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"cannot read {index}: its weight_map names no tensors")
        home = {name: inside(self.directory, file, index) for name, file in weight_map.items()}
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for file in sorted(set(home.values())):
            for name, info in read_header(file)[0].items():
                if home.get(name, file) != file:
                    continue
                if name in found:
                    raise UserError(f"tensor {name} is in {found[name][0]} and in {file}, and {index} does not say which counts")
                found[name] = file, info
        lacking = next((name for name in home if name not in found), None)
        if lacking is not None:
            raise UserError(f"{index} says that {home[lacking].name} holds tensor {lacking}, which it lacks")
        return found

    def find(self, name: str) -> tuple[Path, TensorInfo]:
        """File and place of the tensor ``name``; UserError if the checkpoint lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.directory} lacks the tensor {name} that {self.architecture.name} needs")
        return self.tensors[name]

    @cached_property
    def dtype(self) -> str:
        """Element type of the weights (taken from the embedding), named as in safetensors."""
        return self.find("model.embed_tokens.weight")[1].dtype


def _refuse_quantised(directory: Path, tensors: Iterable[str]) -> None:
    """Raise UserError for a checkpoint that says by a file or by its tensors' names that it is quantised."""
    signs = [name for name in _DESCRIPTIONS if (directory / name).is_file()]
    signs += [name for name in tensors if name.endswith(_QUANTISED)][:1]
    if signs:
        raise UserError(f"{directory} is a quantised checkpoint ({signs[0]}): only unquantised weights can be packed")
