"""A Hugging Face model directory: config.json and one or several safetensors files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from lambdascale.checkpoints.architecture import Architecture, load_architecture
from lambdascale.checkpoints.safetensors_file import TensorInfo, read_header
from lambdascale.core import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HfCheckpoint:
    """Tensors of a model directory with their files. UserError if a file is missing or unreadable."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
        self.directory = directory
        self.architecture: Architecture = load_architecture(directory)
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for file in self._files():
            self.tensors |= {name: (file, info) for name, info in read_header(file)[0].items()}

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"cannot read {index}: {error}") from error
            return [self.directory / name for name in names]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        raise UserError(f"{self.directory} has neither {SINGLE} nor {INDEX}: only safetensors checkpoints are supported")

    def find(self, name: str) -> tuple[Path, TensorInfo]:
        """File and place of the tensor ``name``; UserError if the checkpoint lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.directory} lacks the tensor {name} that {self.architecture.name} needs")
        return self.tensors[name]

    @cached_property
    def dtype(self) -> str:
        """Element type of the weights (taken from the embedding), named as in safetensors."""
        return self.find("model.embed_tokens.weight")[1].dtype
