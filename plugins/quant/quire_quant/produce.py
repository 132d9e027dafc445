"""Makes a quantized checkpoint, layer by layer; what is finished is kept, so that it can be taken up after a kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quire.commands import Checkpoint
from quire.plugin import ConfigError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire_quant.card import REPORT, Report, model_card
from quire_quant.layer import Recipe, Solved, solve_layer
from quire_quant.store import SUFFIXES, fits, read, settings, stored
from quire_quant.walk import Feed, Walk, linears, sharing

PROGRESS = "quantize-progress.json"
NOTES = "quire"
"""Key of a shard's metadata under which its layer's part of the report is kept."""
HELD_OUT = 8
"""One row of so many is kept from calibration, to take the perplexity of."""


@torch.inference_mode()
def produce(
    source: Checkpoint,
    out: Path,
    recipe: Recipe,
    rows: Tensor | None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Report:
    """Write a quantized form of a checkpoint into the folder `out`.

    Args:
        rows: token ids [R, L] to calibrate with, R at least 2; one in eight is held out. None: rtn only.
        progress: called with layers done, layers in all, and what is being done.

    Raises:
        ConfigError: `out` holds something else, or the recipe is not possible.
        UnsupportedModel: the source cannot be quantized here.
    """
    started = time.monotonic()
    if rows is None and recipe.method != "rtn":
        raise ConfigError(f"{recipe.method} needs calibration text", remedy="name a file by --calibration, or use rtn")
    walk = Walk(source)
    work = _Work(walk, out, recipe, rows)
    report = work.begin()
    for index in range(walk.num_layers):
        progress(index, walk.num_layers, f"layer {index}")
        work.layer(index, report)
    progress(walk.num_layers, walk.num_layers, "the rest")
    work.end(report, started)
    return report


class _Work:
    def __init__(self, walk: Walk, out: Path, recipe: Recipe, rows: Tensor | None) -> None:
        self._walk, self._out, self._recipe = walk, out, recipe
        held = max(1, len(rows) // HELD_OUT) if rows is not None else 0
        self._rows = rows
        self._held = rows[-held:] if rows is not None else None
        self._num_calibration = len(rows) - held if rows is not None else 0

    def begin(self) -> Report:
        """An empty report; takes up an unfinished run of the same recipe, and sets the first layer's inputs."""
        checkpoint = self._walk.checkpoint
        recipe = asdict(self._recipe) | {"source": checkpoint.name, "source_bytes": checkpoint.num_bytes}
        recipe["rows"] = _digest(self._rows)
        path = self._out / PROGRESS
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            if begun != recipe:
                raise ConfigError(
                    f"{self._out} holds an unfinished run of other settings: {begun}",
                    remedy="use the same settings to take it up, or another folder",
                )
        elif self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise ConfigError(f"{self._out} is there and not an empty folder", remedy="name a new folder")
        self._check_sizes()
        self._out.mkdir(parents=True, exist_ok=True)
        _write_json(path, recipe)
        if self._rows is not None:
            self._hidden = self._walk.embed(self._rows)
            self._plain = self._hidden[self._num_calibration :].clone()
        return Report(recipe)

    def _check_sizes(self) -> None:
        sizes = {(m.in_features, m.out_features) for m in linears(self._walk.model.model.layers).values()}
        if not any(fits(inputs, outputs, self._recipe.target(inputs)) for inputs, outputs in sizes):
            raise ConfigError(
                f"group_size {self._recipe.group_size} at {self._recipe.bits} bits fits no layer of "
                f"{self._walk.checkpoint.name}: their inputs are {sorted({inputs for inputs, _ in sizes})}",
                remedy="give a group size that divides the inputs, such as 32, 64 or -1",
            )

    def layer(self, index: int, report: Report) -> None:
        """Quantize a layer, or read what an earlier run made of it, and move the inputs on."""
        walk, shard = self._walk, self._shard(index)
        module = walk.load(index)
        if self._rows is not None:
            walk.advance(index, self._plain)
        if not shard.is_file():
            self._solve(index, module, shard)
        with safe_open(str(shard), "pt") as file:
            notes = json.loads(file.metadata()[NOTES])
        report.errors |= notes["errors"]
        report.skipped += notes["skipped"]
        self._restore(index, load_file(shard))
        if self._rows is not None:
            walk.advance(index, self._hidden)
        walk.unload(index)

    def _solve(self, index: int, module: torch.nn.Module, shard: Path) -> None:
        walk, prefix = self._walk, f"model.layers.{index}."
        feed = None
        groups = [[name] for name in linears(module)]
        if self._rows is not None:
            feed = Feed(walk, index, self._hidden[: self._num_calibration])
            groups = sharing(module, feed.probe)
        solved = solve_layer(module, groups, self._recipe, feed)
        notes = {
            "errors": {prefix + name: error for name, error in solved.errors.items()},
            "skipped": [prefix + name for name in linears(module) if name not in solved.solutions],
        }
        _save(self._tensors(index, module, solved), shard, notes)

    def _tensors(self, index: int, module: torch.nn.Module, solved: Solved) -> dict[str, Tensor]:
        """A layer's tensors by their names in the checkpoint: codes, what AWQ's factors changed, and the rest."""
        walk, prefix = self._walk, f"model.layers.{index}."
        tensors: dict[str, Tensor] = {}
        for name in walk.names(index):
            local = name.removeprefix(prefix)
            linear = local.removesuffix(".weight")
            if linear in solved.solutions:
                made = stored(self._recipe.method, solved.solutions[linear])
                tensors |= {f"{prefix}{linear}.{suffix}": tensor for suffix, tensor in made.items()}
            elif local in solved.changed:
                tensors[name] = module.get_parameter(local).data.to(walk.checkpoint.tensors[name].dtype)
            else:
                tensors[name] = walk.tensor(name)
        return tensors

    def _restore(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put in place what a shard holds, so that the next layers see what a reader of it will see."""
        prefix = f"model.layers.{index}."
        layer = self._walk.model.model.layers[index]
        for name, module in linears(layer).items():
            stem = f"{prefix}{name}."
            parts = {suffix: tensors[stem + suffix] for suffix in SUFFIXES if stem + suffix in tensors}
            if parts:
                solution = read(self._recipe.method, parts, self._recipe.target(module.in_features))
                module.weight.data = solution.weight()
        for name, parameter in layer.named_parameters():
            if (kept := tensors.get(prefix + name)) is not None:
                parameter.data = kept.float()

    def end(self, report: Report, started: float) -> None:
        """Write what belongs to no layer, the index, the configuration, the report; the configuration last."""
        walk, out = self._walk, self._out
        if self._rows is not None and self._held is not None:
            report.perplexity_before = walk.perplexity(self._plain, self._held)
            report.perplexity_after = walk.perplexity(self._hidden[self._num_calibration :], self._held)
        _save({name: walk.tensor(name) for name in walk.names(None)}, self._shard(walk.num_layers), {})
        sizes, places = 0, {}
        for index in range(walk.num_layers + 1):
            shard = self._shard(index)
            with safe_open(str(shard), "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    places[name], sizes = shard.name, sizes + file.get_tensor(name).nbytes
        report.bytes_before, report.bytes_after = walk.checkpoint.num_bytes, sizes
        report.seconds = time.monotonic() - started
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": sizes}, "weight_map": places})
        for path in walk.checkpoint.folder.iterdir():
            if (
                path.suffix in (".json", ".jinja", ".txt", ".model")
                and path.name not in NOT_COPIED
                and ".index." not in path.name
            ):
                shutil.copyfile(path, out / path.name)
        _write_json(out / REPORT, asdict(report))
        (out / "README.md").write_text(model_card(report), encoding="utf-8")
        target = self._recipe.target(self._recipe.group_size)
        quantization = settings(self._recipe.method, target, report.skipped, self._recipe.damping)
        _write_json(out / "config.json", {**walk.checkpoint.config, "quantization_config": quantization})
        (out / PROGRESS).unlink()

    def _shard(self, index: int) -> Path:
        return self._out / f"model-{index + 1:05}-of-{self._walk.num_layers + 1:05}.safetensors"


NOT_COPIED = ("config.json", REPORT, PROGRESS)


def _digest(rows: Tensor | None) -> list[int] | None:
    """Tells calibration texts apart."""
    if rows is None:
        return None
    weights = torch.arange(1, rows.numel() + 1)
    return [*rows.shape, int((rows.flatten() * weights).sum() % (1 << 31))]


def _save(tensors: dict[str, Tensor], path: Path, notes: dict[str, Any]) -> None:
    """Whole or not at all."""
    part, metadata = path.with_suffix(".part"), {"format": "pt", NOTES: json.dumps(notes)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(path)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2), encoding="utf-8")
    part.replace(path)
