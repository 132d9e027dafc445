"""Seeded faults, each a plausible bug, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

KV = "tests/kv"
SCHEDULING = "tests/scheduling"
SAMPLING = "tests/sampling"
BATCH = "tests/engine/test_batch_and_dispatch.py"
TEXT = "tests/tokenizer"
CUDA = "tests/cuda_paged/test_cuda_attention.py"
CUDA_OPS = "tests/cuda_paged/test_cuda_ops.py"
REMOTE = "tests/remote/test_remote_engine.py"
DETERMINISTIC = "tests/engine/test_deterministic.py"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault: in `file`, `old` (which occurs exactly once) becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


POOL = "framework/quire/kv/pool.py"
INDEX = "framework/quire/kv/index.py"
PAGED = "framework/quire/kv/paged.py"
RADIX = "framework/quire/kv/radix.py"
CONTINUOUS = "framework/quire/scheduling/continuous.py"
SAMPLER = "framework/quire/sampling/sampler.py"
PROCESSORS = "framework/quire/sampling/processors.py"
KERNELS = "plugins/cuda_paged/quire_cuda_paged/kernels.py"
ROW_KERNELS = "plugins/cuda_paged/quire_cuda_paged/row_kernels.py"
LEDGER = "framework/quire/remote/ledger.py"
BUILDER = "framework/quire/engine/batch.py"
DETOKENIZER = "framework/quire/tokenizer/detokenizer.py"

CSRC = "plugins/cpu_native/quire_cpu_native/csrc"
NATIVE_KITS, NATIVE = "tests/cpu_native/test_kits.py", "tests/cpu_native/test_kernels.py"

MUTANTS = (
    Mutant(
        "native: the last input of an odd number is lost",
        f"{CSRC}/tile.h",
        "if (inputs % 2 == 0) return;",
        "return;",
        NATIVE,
    ),
    Mutant(
        "native: padding of a group is read",
        f"{CSRC}/quant.cpp",
        "k < count ? to_float(in[k]) : 0.0f",
        "to_float(in[k])",
        NATIVE,
    ),
    Mutant(
        "native: sums of rounded inputs are forgotten",
        f"{CSRC}/quant16.cpp",
        "total = (float)sum;",
        "total = 0.0f;",
        NATIVE_KITS,
    ),
    Mutant(
        "native: what a row had is not scaled down",
        f"{CSRC}/attention.cpp",
        "state.total = state.total * keep + sum(total), state.top = top;",
        "state.total = state.total + sum(total), state.top = top;",
        NATIVE_KITS,
    ),
    Mutant(
        "native: splits follow the tile",
        f"{CSRC}/attention.cpp",
        "int64_t begin = std::max(index * SPLIT, first_seen(tile.position));",
        "int64_t begin = std::max(index * SPLIT, tile.position > 8 ? tile.position - 8 : 0);",
        NATIVE_KITS,
    ),
    Mutant(
        "native: the sink gives a value",
        f"{CSRC}/attention.cpp",
        "total = total * factor + exp1(sink - top);",
        "total = total * factor;",
        NATIVE_KITS,
    ),
    Mutant(
        "native: keys are turned the wrong way",
        f"{CSRC}/rows.cpp",
        "store(out + i, sub(mul(a, c), mul(b, s)));",
        "store(out + i, add(mul(a, c), mul(b, s)));",
        NATIVE_KITS,
    ),
    Mutant(
        "native: a task is done twice",
        f"{CSRC}/pool.cpp",
        "ticket_.compare_exchange_weak(ticket, ticket + 1,",
        "ticket_.compare_exchange_weak(ticket, ticket,",
        NATIVE,
    ),
    Mutant(
        "kv: full block one token early", POOL, "full = num_computed // size", "full = (num_computed + 1) // size", KV
    ),
    Mutant(
        "kv: no reference on a hit",
        POOL,
        "        for block in adopted:\n            self._refs[block] += 1\n",
        "",
        KV,
    ),
    Mutant("kv: null block granted", POOL, "deque(range(1, init.num_blocks))", "deque(range(init.num_blocks))", KV),
    Mutant(
        "kv: shared block freed twice",
        POOL,
        "if self._refs[block]:\n                continue",
        "if False:\n                continue",
        KV,
    ),
    Mutant(
        "kv: fork writes into the parent's block",
        POOL,
        "shared = parent.blocks[:full]",
        "shared = parent.blocks[: full + 1]",
        KV,
    ),
    Mutant(
        "kv: copy of the wrong length",
        POOL,
        "BlockCopy(source, granted[0], rest)",
        "BlockCopy(source, granted[0], rest - 1)",
        KV,
    ),
    Mutant(
        "kv: hit evicted while it is adopted",
        POOL,
        "unparked = {block for block in hit.block_ids if self._index.unpark(block)}",
        "unparked = set()",
        KV,
    ),
    Mutant(
        "kv: failed content stays published",
        POOL,
        "self._plain.extend(self._index.withdraw(block))\n        self._release",
        "pass\n        self._release",
        KV,
    ),
    Mutant("kv: salt ignored", PAGED, "hashlib.blake2b(salt.encode(),", "hashlib.blake2b(b'',", KV),
    Mutant("kv: parent left out of the hash", PAGED, "parent + array(", "array(", KV),
    Mutant(
        "kv: newest evicted first", INDEX, "return next(iter(self._parked))", "return next(reversed(self._parked))", KV
    ),
    Mutant("radix: part of a block counted as whole", RADIX, "start += length", "start += size", KV),
    Mutant(
        "scheduler: budget ignored",
        CONTINUOUS,
        "count = min(request.num_tokens - request.num_computed_tokens, round_.budget)",
        "count = request.num_tokens - request.num_computed_tokens",
        SCHEDULING,
    ),
    Mutant(
        "scheduler: preempted request forgotten",
        CONTINUOUS,
        "        self._num_preemptions += 1\n        self._waiting.push(request)\n",
        "        self._num_preemptions += 1\n",
        SCHEDULING,
    ),
    Mutant(
        "scheduler: whole prompt taken from the cache",
        CONTINUOUS,
        "length = 0 if wants_all else request.num_tokens - 1",
        "length = 0 if wants_all else request.num_tokens",
        SCHEDULING,
    ),
    Mutant(
        "scheduler: pending tokens forgotten",
        CONTINUOUS,
        "        request.num_pending_tokens += samples\n",
        "",
        SCHEDULING,
    ),
    Mutant(
        "scheduler: blocks freed under a step in flight",
        CONTINUOUS,
        "        if self._outstanding[key]:\n            return\n",
        "",
        SCHEDULING,
    ),
    Mutant("scheduler: slot not released", CONTINUOUS, "        self._released.append(request.slot)\n", "", SCHEDULING),
    Mutant(
        "scheduler: fork before the parent's prompt is computed",
        CONTINUOUS,
        "return parent.request_id in self._forkable",
        "return parent.request_id in self._running",
        SCHEDULING,
    ),
    Mutant(
        "scheduler: victims without bound", CONTINUOUS, "MAX_PREEMPTIONS = 3", "MAX_PREEMPTIONS = 10**9", SCHEDULING
    ),
    Mutant(
        "scheduler: prompt log probabilities lost to the cache",
        CONTINUOUS,
        "wants_all = request.params.prompt_logprobs is not None",
        "wants_all = False",
        SCHEDULING,
    ),
    Mutant(
        "policy: no ageing",
        "framework/quire/scheduling/policies.py",
        "request.priority - waited / self._seconds_per_level",
        "request.priority",
        SCHEDULING,
    ),
    Mutant(
        "sampler: top-k one too many",
        SAMPLER,
        "scaled.topk(k).values[-1]",
        "scaled.topk(min(k + 1, scaled.numel())).values[-1]",
        SAMPLING,
    ),
    Mutant("sampler: top-p before renormalising", SAMPLER, "cumulative[-1] * top_p", "top_p", SAMPLING),
    Mutant(
        "sampler: min-p of the mass",
        SAMPLER,
        "weights.masked_fill(weights < min_p, 0.0)",
        "weights.masked_fill(weights < min_p * weights.sum(), 0.0)",
        SAMPLING,
    ),
    Mutant(
        "sampler: position ignored",
        "framework/quire/sampling/philox.py",
        "counter = (positions & _MASK,",
        "counter = (zero,",
        SAMPLING,
    ),
    Mutant(
        "sampler: draw depends on the row", SAMPLER, "draw(weights, draws[row])", "draw(weights, draws[0])", SAMPLING
    ),
    Mutant(
        "penalties: prompt counts as output",
        PROCESSORS,
        "_count(output, known[request.num_prompt_tokens :])",
        "_count(output, known)",
        SAMPLING,
    ),
    Mutant(
        "min_tokens: one too few",
        PROCESSORS,
        "if known + 1 <= minimum.num_tokens:",
        "if known + 1 < minimum.num_tokens:",
        SAMPLING,
    ),
    Mutant(
        "log probabilities: rank off by one",
        "framework/quire/sampling/logprobs.py",
        "rank = int((logprobs > chosen).sum()) + 1",
        "rank = int((logprobs > chosen).sum())",
        SAMPLING,
    ),
    Mutant(
        "batch: position off by one",
        BUILDER,
        "np.repeat(starts[:-1] - computed, new)",
        "np.repeat(starts[:-1] - computed - 1, new)",
        BATCH,
    ),
    Mutant(
        "batch: padding outside the null block",
        BUILDER,
        "null_slot + padding % self._block_size",
        "null_slot + padding + self._block_size",
        BATCH,
    ),
    Mutant(
        "batch: padding rows have a length",
        BUILDER,
        "self._seq_lens.array[num_reqs:padded_reqs] = 0",
        "self._seq_lens.array[num_reqs:padded_reqs] = 1",
        BATCH,
    ),
    Mutant(
        "batch: first row sampled instead of last", BUILDER, "starts[1:][samples] - 1", "starts[:-1][samples]", BATCH
    ),
    Mutant("text: stop string shown", DETOKENIZER, "keep = self._longest_start(whole)", "keep = 0", TEXT),
    Mutant(
        "text: half characters shown", DETOKENIZER, "if not text or text.endswith(INCOMPLETE):", "if not text:", TEXT
    ),
    Mutant(
        "text: minimum one short",
        DETOKENIZER,
        "armed=self._num_tokens > self._params.min_tokens",
        "armed=self._num_tokens >= self._params.min_tokens",
        TEXT,
    ),
    Mutant("text: garbage waits for ever", DETOKENIZER, "> LIMIT else", "> 10**9 else", TEXT),
    Mutant(
        "chat: a marker that overlaps itself stays",
        "framework/quire/tokenizer/tokenizer.py",
        "while marker in text:",
        "if marker in text:",
        TEXT,
    ),
    Mutant(
        "sampler: top-p drops tokens that count",
        SAMPLER,
        "/ (2 * weights.shape[0])",
        "* 2",
        SAMPLING,
    ),
    Mutant("penalties: tokens counted twice", PROCESSORS, "counts.num_tokens = known", "pass", SAMPLING),
    Mutant(
        "parser: NaN passes for JSON",
        "framework/quire/parsers/qwen.py",
        "allow_nan=False",
        "allow_nan=True",
        "tests/parsers",
    ),
    Mutant(
        "deterministic: a linear sees as many rows as the batch has",
        "plugins/cpu_ref/quire_cpu_ref/linear.py",
        "padded = functional.pad(x, (0, 0, 0, -num_rows % TILE))",
        "padded = x",
        DETERMINISTIC,
    ),
    Mutant(
        "deterministic: stale keys and values show",
        "plugins/cpu_ref/quire_cpu_ref/tiles.py",
        "found[tile.start + tile.rows[1] :] = 0.0",
        "pass",
        "tests/cpu_ref",
    ),
    Mutant(
        "remote: replay forgets the tokens that were told",
        LEDGER,
        "output_token_ids=self.sequences[index].token_ids",
        "output_token_ids=[]",
        REMOTE,
    ),
    Mutant(
        "remote: prompt log probabilities are told twice",
        LEDGER,
        "sequence.to_skip = sequence.num_prompt_logprobs",
        "sequence.to_skip = 0",
        REMOTE,
    ),
    Mutant(
        "remote: text told before is told again",
        "framework/quire/engine/emission.py",
        "detokenizer.update(request.output_token_ids, finished=False)",
        "pass",
        REMOTE,
    ),
    Mutant(
        "remote: a child that hangs is waited for",
        "framework/quire/remote/supervisor.py",
        "elif message.busy_s > self._step_timeout:",
        "elif False:",
        REMOTE,
    ),
    Mutant(
        "remote: a request that kills children is replayed for ever",
        "framework/quire/remote/engine.py",
        "if live.num_losses > MAX_LOSSES:",
        "if False:",
        REMOTE,
    ),
    Mutant(
        "isolate: the culprit's half ends with it",
        "framework/quire/engine/isolate.py",
        "if len(rows) > 1 and self._num_culprits < MAX_CULPRITS:",
        "if len(rows) > 2 and self._num_culprits < MAX_CULPRITS:",
        "tests/engine/test_isolate.py",
    ),
    Mutant(
        "kernel: a tile at the causal edge goes unmasked",
        KERNELS,
        "(begin + 1) // TILE",
        "(begin + TILE) // TILE",
        CUDA,
    ),
    Mutant(
        "kernel: window one too wide",
        KERNELS,
        "position[:, None] - key[None, :] < WINDOW",
        "position[:, None] - key[None, :] <= WINDOW",
        CUDA,
    ),
    Mutant(
        "kernel: every part takes the sink",
        KERNELS,
        "if part == 0:",
        "if part >= 0:",
        CUDA,
    ),
    Mutant(
        "kernel: stale slots of the last block count",
        KERNELS,
        "seen = (key[None, :] <= position[:, None]) & row_ok[:, None] & known[None, :]",
        "seen = row_ok[:, None] & known[None, :]",
        CUDA,
    ),
    Mutant(
        "kernel: parts are averaged",
        KERNELS,
        "weight = tl.exp2(lse - safe)",
        "weight = 1.0",
        CUDA,
    ),
    Mutant(
        "kernel: the softmax forgets to shrink",
        KERNELS,
        "acc * shrink[:, None]",
        "acc",
        CUDA,
    ),
    Mutant(
        "kernel: padding is left as it was",
        KERNELS,
        "tl.load(end_ptr), num_tokens",
        "num_tokens, num_tokens",
        CUDA,
    ),
    Mutant(
        "kernel: the last part is not planned",
        KERNELS,
        "splits = (tiles + chunk - 1) // chunk",
        "splits = tl.maximum(tiles // chunk, 1)",
        CUDA,
    ),
    Mutant(
        "kernel: the residual is normed but not kept",
        ROW_KERNELS,
        "tl.store(at, x.to(residual_ptr.dtype.element_ty), mask=inside)",
        "pass",
        CUDA_OPS,
    ),
    Mutant(
        "kernel: the norm rounds once only",
        ROW_KERNELS,
        "result = _rounded(normed, out_ptr) * weight",
        "result = normed * weight",
        CUDA_OPS,
    ),
    Mutant(
        "kernel: gate and value swapped",
        ROW_KERNELS,
        "result = _rounded(active, out_ptr) * value",
        "result = _rounded(value / (1.0 + tl.exp(-value)), out_ptr) * gate",
        CUDA_OPS,
    ),
    Mutant(
        "kernel: turned the wrong way",
        ROW_KERNELS,
        "tl.where(first[None, :], -y, y)",
        "tl.where(first[None, :], y, -y)",
        CUDA,
    ),
    Mutant(
        "kernel: the partner is not normed",
        ROW_KERNELS,
        "y = _normed(y.to(tl.float32), scale, weight[None, :], offset, x_ptr, NORM)",
        "y = y.to(tl.float32)",
        CUDA,
    ),
    Mutant(
        "kernel: keys are cached before they are turned",
        ROW_KERNELS,
        "tl.store(k_cache_ptr + slot * k_slot + at, k.to(",
        "tl.store(k_cache_ptr + slot * k_slot + at, tl.load(qkv + HEADS * D + at, mask=inside, other=0.0).to(",
        CUDA,
    ),
)
