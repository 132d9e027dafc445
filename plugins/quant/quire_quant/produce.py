"""Makes a quantized checkpoint, layer by layer; what is finished is kept, so that it can be taken up after a kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from quire.commands import Checkpoint
from quire.plugin import ConfigError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire_quant.layer import Recipe, solve_layer
from quire_quant.store import read, settings, stored
from quire_quant.walk import Walk, linears, sharing

PROGRESS = "quantize-progress.json"
REPORT = "quantize-report.json"
HELD_OUT = 8
"""One row of so many is kept from calibration, to take the perplexity of."""


@dataclass
class Report:
    """What came of it.

    Attributes:
        errors: linear layer -> error of its output relative to the output, root mean square; empty without inputs.
        skipped: linear layers that stay as they were, as they do not fill whole groups and words.
        perplexity_before, perplexity_after: on rows held out from calibration; None without.
        bytes_before, bytes_after: of all weights. seconds: of this run.
    """

    recipe: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0


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
        """The report so far, of this recipe's unfinished run if there is one; sets the first layer's inputs."""
        recipe = asdict(self._recipe) | {"source": self._walk.checkpoint.name, "rows": _digest(self._rows)}
        report, path = Report(recipe), self._out / PROGRESS
        if path.is_file():
            report = Report(**json.loads(path.read_text(encoding="utf-8")))
            if report.recipe != recipe:
                raise ConfigError(
                    f"{self._out} holds an unfinished run of other settings: {report.recipe}",
                    remedy="use the same settings to take it up, or another folder",
                )
        elif self._out.exists() and any(self._out.iterdir()):
            raise ConfigError(f"{self._out} is not empty", remedy="name a new folder")
        self._out.mkdir(parents=True, exist_ok=True)
        self._note(report)
        if self._rows is not None:
            self._hidden = self._walk.embed(self._rows)
            self._plain = self._hidden[self._num_calibration :]
        return report

    def layer(self, index: int, report: Report) -> None:
        """Quantize a layer, or read what an earlier run made of it, and move the inputs on."""
        walk, shard = self._walk, self._shard(index)
        module = walk.load(index)
        if self._rows is not None:
            self._plain = walk.run(index, self._plain)
        if shard.is_file():
            self._restore(index, load_file(shard))
        else:
            self._solve(index, module, report, shard)
            self._note(report)
        if self._rows is not None:
            self._hidden = walk.run(index, self._hidden)
        walk.unload(index)

    def _solve(self, index: int, module: torch.nn.Module, report: Report, shard: Path) -> None:
        walk, recipe, prefix = self._walk, self._recipe, f"model.layers.{index}."
        run = None
        groups = [[name] for name in linears(module)]
        if self._rows is not None:
            hidden = self._hidden[: self._num_calibration]
            groups = sharing(module, lambda: walk.run(index, hidden[:1]))

            def run() -> Tensor:
                return walk.run(index, hidden)

        solved = solve_layer(module, groups, recipe, run)
        tensors: dict[str, Tensor] = {}
        for name in walk.names(index):
            local = name.removeprefix(prefix)
            linear = local.removesuffix(".weight")
            if linear in solved.solutions:
                made = stored(recipe.method, solved.solutions[linear])
                tensors |= {f"{prefix}{linear}.{suffix}": tensor for suffix, tensor in made.items()}
            elif local in solved.changed:
                tensors[name] = module.get_parameter(local).data.to(walk.checkpoint.tensors[name].dtype)
            else:
                tensors[name] = walk.tensor(name)
        report.errors |= {prefix + name: error for name, error in solved.errors.items()}
        report.skipped += [prefix + name for name in linears(module) if name not in solved.solutions]
        _save(tensors, shard)
        self._restore(index, tensors)

    def _restore(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Put in place what a shard holds, so that the next layers see what a reader of it will see."""
        prefix = f"model.layers.{index}."
        layer = self._walk.model.model.layers[index]
        for name, module in linears(layer).items():
            parts = {
                s: t
                for s in ("qweight", "qzeros", "scales", "g_idx")
                if (t := tensors.get(f"{prefix}{name}.{s}")) is not None
            }
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
        _save({name: walk.tensor(name) for name in walk.names(None)}, self._shard(walk.num_layers))
        sizes, places = 0, {}
        for index in range(walk.num_layers + 1):
            shard = self._shard(index)
            for name, tensor in load_file(shard).items():
                places[name], sizes = shard.name, sizes + tensor.nbytes
        report.bytes_before, report.bytes_after = walk.checkpoint.num_bytes, sizes
        report.seconds = time.monotonic() - started
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": sizes}, "weight_map": places})
        for path in walk.checkpoint.folder.iterdir():
            if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in NOT_COPIED:
                shutil.copyfile(path, out / path.name)
        _write_json(out / REPORT, asdict(report))
        (out / "README.md").write_text(model_card(report), encoding="utf-8")
        target = self._recipe.target(self._recipe.group_size)
        quantization = settings(self._recipe.method, target, report.skipped, self._recipe.damping)
        _write_json(out / "config.json", {**walk.checkpoint.config, "quantization_config": quantization})
        (out / PROGRESS).unlink()

    def _shard(self, index: int) -> Path:
        return self._out / f"model-{index + 1:05}-of-{self._walk.num_layers + 1:05}.safetensors"

    def _note(self, report: Report) -> None:
        _write_json(self._out / PROGRESS, asdict(report))


NOT_COPIED = ("config.json", "model.safetensors.index.json", REPORT, PROGRESS)


def model_card(report: Report) -> str:
    """A README for the checkpoint: how it was made and what it lost."""
    recipe = report.recipe
    lines = [
        f"# {recipe['source']}, {recipe['method']} {recipe['bits']} bits",
        "",
        f"Made by `quire quantize` from `{recipe['source']}`: method {recipe['method']}, {recipe['bits']} bits, "
        f"groups of {recipe['group_size']}, {'symmetric' if recipe['sym'] else 'with zero points'}.",
        "",
        f"- weights: {report.bytes_before:,} bytes before, {report.bytes_after:,} after",
    ]
    if report.perplexity_before is not None:
        lines.append(
            f"- perplexity on held-out calibration text: {report.perplexity_before:.4f} before, "
            f"{report.perplexity_after:.4f} after"
        )
    if report.errors:
        mean = sum(report.errors.values()) / len(report.errors)
        lines.append(f"- relative error of a layer's output: {mean:.4f} on average; each layer's in {REPORT}")
    lines += ["", "Say here what the model is for, what it was trained on, and under which licence it stands.", ""]
    return "\n".join(lines)


def _digest(rows: Tensor | None) -> list[int] | None:
    """Tells calibration texts apart."""
    if rows is None:
        return None
    weights = torch.arange(1, rows.numel() + 1)
    return [*rows.shape, int((rows.flatten() * weights).sum() % (1 << 31))]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"format": "pt"})
    part.replace(path)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2), encoding="utf-8")
    part.replace(path)
