"""Engine benchmark on one GPU: random weights made there, in the shapes of known models; no checkpoint is needed.

    python benchmarks/gpu_engine.py [--shape qwen3-0.6b] [--json FILE] [--peer SCRIPT --peer-path FOLDER]

Two parts, each after a run that warms up. *throughput*: nano-vllm's workload (seed 0; 256 requests of 100 to 1024
prompt tokens, 100 to 1024 output tokens). *decode*: seconds of a step at 1, 64 and 256 requests of 1024 tokens each,
and what the host does in it: it must be less than the device's time, which hides it when steps overlap.

With --peer a script that runs vLLM on the same workload (it is given the folder with config.json, and the name of an
attention backend, and prints lines that begin with RESULT) runs in the same call, its packages found at --peer-path.
`--shape tiny` runs anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "qwen3-8b": QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "tie_word_embeddings": False},
    "llama-3.1-8b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "tie_word_embeddings": False, "rope_theta": 500000.0},
    "tiny": QWEN3
    | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
COMMON = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16"}
DECODE_STEPS = 128
HOST_PARTS = ("schedule_s", "build_s", "forward_s", "sample_s", "update_s")


def write_checkpoint(folder: Path, shape: str) -> None:
    """A folder that looks like a checkpoint: its weights are a file of holes, whose names and shapes alone are read."""
    from quire.testing.tiny_models import save_byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = COMMON | SHAPES[shape]
    save_byte_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and settings["tie_word_embeddings"]:
            continue
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def random_tensors(tensors: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """In place of the files' content: norms of one, matrices that keep the size of what they multiply."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    for name, stored in tensors.items():
        if len(stored.shape) == 1:
            yield name, torch.ones(stored.shape, dtype=stored.dtype, device=device)
        else:
            spread = stored.shape[-1] ** -0.5
            drawn = torch.randn(stored.shape, dtype=stored.dtype, device=device, generator=generator)
            yield name, drawn * spread


def make_llm(folder: Path, options: Mapping[str, Any]) -> Any:
    """An engine on random weights."""
    import quire.loader.load
    from quire import LLM

    quire.loader.load.read_tensors = random_tensors  # type: ignore[assignment]
    return LLM(str(folder), enable_prefix_caching=False, max_model_len=4096, **options)


def sampling(count: int) -> Any:
    """Parameters of a request of so many output tokens."""
    from quire import SamplingParams

    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count, detokenize=False)


def random_ids(length: int, vocab: int) -> list[int]:
    """A prompt, drawn as nano-vllm's benchmark draws it."""
    return [random.randint(0, min(10000, vocab - 1)) for _ in range(length)]


def throughput(llm: Any, vocab: int, num_requests: int) -> dict[str, float]:
    """Output tokens per second of nano-vllm's workload."""
    random.seed(0)
    prompts = [random_ids(random.randint(100, 1024), vocab) for _ in range(num_requests)]
    counts = [random.randint(100, 1024) for _ in range(num_requests)]
    llm.generate([[1, 2, 3]], sampling(8), use_tqdm=False)
    begin = time.perf_counter()
    llm.generate(prompts, [sampling(count) for count in counts], use_tqdm=False)
    took = time.perf_counter() - begin
    return {"output tokens": sum(counts), "s": took, "tok/s": sum(counts) / took}


def decode(llm: Any, vocab: int, batch: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step in which every request gets a token, and the parts of the host's time, medians."""
    engine = llm.engine
    for index in range(batch):
        engine.add(engine.prepare(f"{batch}/{index}", random_ids(context, vocab), sampling(steps + 8)))
    seen, times = [], []
    while engine.has_work():
        engine.step()
        stats = engine.last_step
        is_new = stats is not None and (not seen or stats.step_id > seen[-1].step_id)
        if is_new and stats.num_rows == batch == stats.num_tokens:
            seen.append(stats)
            times.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[2:])]
    result = {"ms": 1000 * statistics.median(gaps)}
    parts = {part: 1000 * statistics.median(getattr(stats, part) for stats in seen) for part in HOST_PARTS}
    return result | {"host ms": sum(parts.values())} | {name.replace("_s", " ms"): parts[name] for name in parts}


def measure(shape: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Everything of one shape, in this process, part by part."""
    batches = [int(size) for size in arguments.batches.split(",")]
    vocab = SHAPES[shape]["vocab_size"]
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), shape)
        begin = time.perf_counter()
        options = dict(item.split("=", 1) for item in arguments.option)
        sizes = {"max_num_seqs": max(256, *batches), "max_num_batched_tokens": arguments.max_num_batched_tokens}
        llm = make_llm(Path(name), {"device": arguments.device} | sizes | options)
        yield "start s", time.perf_counter() - begin
        yield "config", llm.engine.config.to_dict()
        if "throughput" in arguments.parts:
            yield "throughput", throughput(llm, vocab, arguments.requests)
        for batch in batches if "decode" in arguments.parts else []:
            yield f"decode {batch}", decode(llm, vocab, batch, arguments.context, arguments.steps)
        llm.shutdown()


def measure_peer(shape: str, script: Path, packages: Path, backend: str, limit_s: int) -> dict[str, Any]:
    """vLLM on the same workload, in a process of its own; what it has told when its time is up counts."""
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), shape)
        settings = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        environment = os.environ | settings | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": str(packages)}
        told, errors = Path(name) / "told", Path(name) / "errors"
        with told.open("w") as out, errors.open("w") as err:
            command = [sys.executable, "-u", str(script), name, backend]
            try:
                answer = subprocess.run(command, stdout=out, stderr=err, env=environment, timeout=limit_s, check=False)
                code: int | str = answer.returncode
            except subprocess.TimeoutExpired:
                code = f"none, stopped after {limit_s} s"
        said = told.read_text(errors="replace").splitlines()
        lines = [line.removeprefix("RESULT ") for line in said if line.startswith("RESULT ")]
        return {"lines": lines, "exit code": code, "errors": errors.read_text(errors="replace")[-2000:]}


def parts(shape: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, figures) of all that is asked for."""
    if arguments.parts != "peer":
        yield from measure(shape, arguments)
    for backend in arguments.peer_backends.split(",") if arguments.peer else []:
        found = measure_peer(shape, arguments.peer, arguments.peer_path, backend, arguments.peer_limit)
        yield f"vllm {backend}", found


def report(results: Mapping[str, Any]) -> None:
    """The table."""
    print(f"{'':14}{'':12}{'per second':>12}{'ms/step':>10}{'host ms':>10}   of which")
    for shape, result in results.items():
        for part, row in result.items():
            if part == "throughput":
                print(
                    f"{shape:14}{part:12}{row['tok/s']:12.0f}   {row['output tokens']:.0f} tokens in {row['s']:.1f} s"
                )
            elif part.startswith("decode"):
                rate = 1000 * int(part.split()[1]) / row["ms"]
                split = ", ".join(f"{name.removesuffix(' ms')} {row[name]:.2f}" for name in list(row)[2:])
                print(f"{shape:14}{part:12}{rate:12.0f}{row['ms']:10.3f}{row['host ms']:10.3f}   {split}")
            elif part.startswith("vllm"):
                told = row["lines"] or [row["errors"][-300:]]
                told += [f"exit code {row['exit code']}"] if row["exit code"] else []
                print("\n".join(f"{shape:14}{part}: {line}" for line in told))


def main() -> int:
    """Command line; 1 if a peer failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be given several times")
    parser.add_argument("--parts", default="throughput,decode", help="which parts to run; peer: only that")
    parser.add_argument("--batches", default="1,64,256", help="requests of the decode part")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of the decode part")
    parser.add_argument("--steps", type=int, default=DECODE_STEPS, help="steps of the decode part")
    parser.add_argument("--requests", type=int, default=256, help="requests of the throughput part")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--option", action="append", default=[], metavar="FIELD=VALUE", help="of the engine")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--peer", type=Path, help="script that runs vLLM")
    parser.add_argument("--peer-path", type=Path, help="folder of vLLM's packages")
    parser.add_argument("--peer-backends", default="FLASH_ATTN,TRITON_ATTN")
    parser.add_argument("--peer-limit", type=int, default=300, help="seconds for vLLM with each of them")
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}
    results: dict[str, Any] = {}
    for shape in arguments.shape or ["qwen3-0.6b"]:
        for part, figures in parts(shape, arguments):
            results.setdefault(shape, {})[part] = figures
            if arguments.json is not None:  # after each, so that a time limit leaves what there is
                arguments.json.write_text(json.dumps({"machine": machine, "shapes": results}, indent=1, default=str))
    report(results)
    peers = [row for result in results.values() for part, row in result.items() if part.startswith("vllm")]
    return int(any(row["exit code"] != 0 for row in peers))


if __name__ == "__main__":
    sys.exit(main())
