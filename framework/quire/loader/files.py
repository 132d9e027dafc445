"""Weights on disk: safetensors, in one file or in shards with an index. Nothing else is opened.

Format: https://huggingface.co/docs/safetensors. The library checks offsets and sizes; what it lets
pass and we refuse is a header that names a tensor twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quire.errors import ConfigError, UnsupportedModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAPPED_BYTES = 256 * 1024 * 1024
MAX_HEADER = 100 * 1024 * 1024
PICKLE_MAGIC = (b"\x80", b"PK\x03\x04")
"""First bytes of a pickle, and of the zip archive that torch.save writes."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is stored: `offset` counts bytes from the start of the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def index_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint. Raises ConfigError for missing or damaged files, or pickles."""
    listed = _listed(folder)
    found: dict[str, StoredTensor] = {}
    for path in sorted(set(listed.values())):
        for name, tensor in read_header(path).items():
            if name in found:
                raise ConfigError(f"tensor {name!r} stands in {found[name].path.name} and in {path.name}")
            if listed.get(name, path) != path:
                raise ConfigError(f"{INDEX} puts {name!r} into {listed[name].name}; it stands in {path.name}")
            found[name] = tensor
    absent = [name for name in listed if name and name not in found]
    if absent:
        raise ConfigError(f"{INDEX} names tensor {absent[0]!r}, which {listed[absent[0]].name} does not hold")
    return found


def _listed(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, as the index says; one nameless entry for a single file."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): folder / str(file) for name, file in names.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index} is damaged: {error}", remedy="fetch the checkpoint again") from error
        for path in set(files.values()):
            if path.parent != folder:
                raise ConfigError(f"{index} points outside the checkpoint: {path}")
            if not path.is_file():
                raise ConfigError(f"{path.name} is missing in {folder}", remedy="fetch the checkpoint again")
        return files
    single = folder / SINGLE
    if single.is_file():
        return {"": single}
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedModel(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when they are opened",
            remedy="convert them: load with transformers where you trust them, save_pretrained writes safetensors",
        )
    raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}", remedy="fetch the checkpoint again")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises ConfigError."""
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(PICKLE_MAGIC) and not _looks_like_header(start, path):
            raise UnsupportedModel(f"{path} is a pickle, whatever its name says", remedy="use safetensors weights")
        size = int.from_bytes(start, "little")
        if len(start) < 8 or size > min(MAX_HEADER, path.stat().st_size - 8):
            raise ConfigError(f"{path} is not a safetensors file, or is cut short", remedy="fetch it again")
        raw = file.read(size)
    try:
        header: dict[str, Any] = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        return {name: _stored(path, name, entry, 8 + size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the header of {path} is damaged: {error}", remedy="fetch it again") from error


def read_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in turn, file by file, as a view of the mapped file that is valid until the next.

    A file is mapped anew every MAPPED_BYTES, because the pages of a mapping count as the process's
    memory until it is closed: without that, loading would peak at twice the checkpoint.
    """
    for path, names in _portions(tensors):
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged: {error}", remedy="fetch it again") from error


def _portions(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[Path, list[str]]]:
    """Names of one file, as many as make up MAPPED_BYTES, in the order of `tensors`."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.path, []).append(name)
    for path, names in by_file.items():
        portion: list[str] = []
        size = 0
        for name in names:
            portion.append(name)
            size += tensors[name].num_bytes
            if size >= MAPPED_BYTES:
                yield path, portion
                portion, size = [], 0
        if portion:
            yield path, portion


def _looks_like_header(start: bytes, path: Path) -> bool:
    """A header whose length happens to begin like a pickle is followed by a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" and int.from_bytes(start, "little") <= MAX_HEADER


def _stored(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}; known are {sorted(DTYPES)}")
    shape = tuple(int(size) for size in entry["shape"])
    return StoredTensor(path, shape, DTYPES[entry["dtype"]], data_start + int(entry["data_offsets"][0]))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands in it twice")
    return names
