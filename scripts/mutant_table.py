"""Seeded faults, each a plausible bug, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

KV = "tests/kv"
SCHEDULING = "tests/scheduling"
SAMPLING = "tests/sampling"
BATCH = "tests/engine/test_batch_and_dispatch.py"
OVERLAP = "tests/engine/test_overlapping_steps.py"
GRAPHS = "tests/engine/test_graphs.py"
MOVES = "tests/cpu_native/test_moves.py"
TEXT = "tests/tokenizer"
CUDA = "tests/cuda_paged/test_cuda_attention.py"
CUDA_PROBE = "tests/cuda_paged/test_probe_and_tuning.py"
CUDA_SAMPLER = "tests/cuda_paged/test_cuda_sampler.py"
CUDA_OPS = "tests/cuda_paged/test_cuda_ops.py"
REMOTE = "tests/remote/test_remote_engine.py"
QUANT_WORDS = "tests/quant_cuda/test_words.py"
QUANT_CUDA = "tests/quant_cuda/test_kernels.py"
QUANT_FLOAT8 = "tests/quant_cuda/test_float8.py"
CPU_REF = "tests/cpu_ref/test_attention.py"
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
CUDA_ATTENTION = "plugins/cuda_paged/quire_cuda_paged/attention.py"
KERNELS = "plugins/cuda_paged/quire_cuda_paged/kernels.py"
SAMPLING_KERNELS = "plugins/cuda_paged/quire_cuda_paged/sampling_kernels.py"
ROW_KERNELS = "plugins/cuda_paged/quire_cuda_paged/row_kernels.py"
WORDS = "plugins/quant/quire_quant/cuda_words.py"
CODE_KERNELS = "plugins/quant/quire_quant/cuda_kernels.py"
CODE_LAUNCHES = "plugins/quant/quire_quant/cuda_launches.py"
FLOAT8_LINEAR = "plugins/quant/quire_quant/float8_linear.py"
FLOAT8_KERNELS = "plugins/quant/quire_quant/float8_kernels.py"
SCALED_MM = "plugins/quant/quire_quant/scaled_mm.py"
CODE_LINEAR = "plugins/quant/quire_quant/cuda_linear.py"
LEDGER = "framework/quire/remote/ledger.py"
BUILDER = "framework/quire/engine/batch.py"
FORWARD = "framework/quire/engine/forward.py"
PIPELINE = "framework/quire/sampling/pipeline.py"
ROWS = "framework/quire/engine/rows.py"
RUNNER = "framework/quire/engine/runner.py"
STAGING = "framework/quire/engine/staging.py"
DETOKENIZER = "framework/quire/tokenizer/detokenizer.py"

CSRC = "plugins/cpu_native/quire_cpu_native/csrc"
NATIVE_KITS, NATIVE = "tests/cpu_native/test_kits.py", "tests/cpu_native/test_kernels.py"
NATIVE_SAMPLER = "tests/cpu_native/test_sampler.py"
NATIVE_ATTENTION = "tests/cpu_native/test_attention.py"

MUTANTS = (
    Mutant(
        "native: the last input of an odd number is lost",
        f"{CSRC}/tile.h",
        "k < inputs; k += 2) {\n        const bf16* pair = w + k * stride;\n#if",
        "k + 1 < inputs; k += 2) {\n        const bf16* pair = w + k * stride;\n#if",
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
        f"{CSRC}/rounded.h",
        "total = sum(sums);",
        "total = 0.0f;",
        NATIVE_KITS,
    ),
    Mutant(
        "native: a span of 8-bit inputs has the scale of the one before",
        f"{CSRC}/rounded.h",
        "at = (g * per_group + s) * stride + row;",
        "at = (g * per_group + (s + 1) % per_group) * stride + row;",
        NATIVE,
    ),
    Mutant(
        "native: codes of 8 bits lose their sign",
        f"{CSRC}/simd.h",
        "_mm256_sign_epi8(b, a.centred)",
        "b",
        NATIVE,
    ),
    Mutant(
        "native: codes of 6 bits that stand above others lose two bits",
        f"{CSRC}/codes.h",
        "lowered<2>(fours[3])",
        "lowered<4>(fours[3])",
        NATIVE,
    ),
    Mutant(
        "native: a query has the scores of another",
        f"{CSRC}/floats.h",
        "memcpy(to + i * apart, all + i * J, J * sizeof(float));",
        "memcpy(to + i * apart, all, J * sizeof(float));",
        NATIVE_KITS,
    ),
    Mutant(
        "native: what the splits before had is not scaled down",
        f"{CSRC}/attention.h",
        "into[r].total = into[r].total * a + from[r].total * b, into[r].top = top;",
        "into[r].total = into[r].total + from[r].total * b, into[r].top = top;",
        NATIVE_ATTENTION,
    ),
    Mutant(
        "native: rows that are multiplied together see what the first of them sees",
        f"{CSRC}/attention.h",
        "tile.position + (r / 4 * 4 + 3) / group + 1 - at",
        "tile.position + r / 4 * 4 / group + 1 - at",
        NATIVE_KITS,
    ),
    Mutant(
        "native: splits follow the tile",
        f"{CSRC}/attention.h",
        "from = std::max(p.first_seen(tile.position) - at, (int64_t)0),",
        "from = std::max((tile.position > 8 ? tile.position - 8 : 0) - at, (int64_t)0),",
        NATIVE_KITS,
    ),
    Mutant(
        "native: the sink gives a value",
        f"{CSRC}/attention.h",
        "total = total * factor + exp1(sink - top);",
        "total = total * factor;",
        NATIVE_KITS,
    ),
    Mutant(
        "native: values have the scales of keys",
        f"{CSRC}/attention.cpp",
        "v{values, v_scales}",
        "v{values, k_scales}",
        NATIVE_KITS,
    ),
    Mutant(
        "native: the largest of a head is that of its positive numbers",
        f"{CSRC}/rows.cpp",
        "most = max(most, max(value, sub(zero(), value)));",
        "most = max(most, value);",
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
        "native: tokens as likely as the last of top-k are cut off",
        f"{CSRC}/sampler.cpp",
        "if (scaled >= least)",
        "if (scaled > least)",
        NATIVE_SAMPLER,
    ),
    Mutant(
        "native: a token is chosen from what is not finite",
        f"{CSRC}/sampler.cpp",
        "return odd == 0.0f ?",
        "return odd <= 1.0f ?",
        NATIVE_SAMPLER,
    ),
    Mutant(
        "native: a bucket of weights too many",
        f"{CSRC}/sampler.cpp",
        "sum + held[reached] < goal",
        "sum + held[reached] <= goal * 1.1",
        NATIVE_SAMPLER,
    ),
    Mutant(
        "native: the second half of the seed is lost",
        f"{CSRC}/sampler.cpp",
        "k1 = (uint32_t)(seed >> 32);",
        "k1 = 0;",
        NATIVE_SAMPLER,
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
        "count = min(missing, round_.budget)",
        "count = missing",
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
        "rank = (logprobs > chosen).sum() + 1",
        "rank = (logprobs > chosen).sum()",
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
        "NULL_BLOCK * self._block_size + self._offsets[:count] % self._block_size",
        "NULL_BLOCK * self._block_size + self._offsets[:count] + self._block_size",
        BATCH,
    ),
    Mutant(
        "batch: padding rows have a length",
        BUILDER,
        "seq_lens.array[num_reqs:] = 0",
        "seq_lens.array[num_reqs:] = 1",
        BATCH,
    ),
    Mutant(
        "batch: first row sampled instead of last",
        BUILDER,
        "starts[1:][chosen] - 1",
        "starts[:-1][chosen]",
        BATCH,
    ),
    Mutant(
        "overlap: end token kept and another one after it",
        CONTINUOUS,
        "            if request.is_finished:\n                self._let_go(request)\n            else:\n                updates",
        "            if request.is_finished:\n                self._let_go(request)\n            if True:\n                updates",
        OVERLAP,
    ),
    Mutant(
        "overlap: pending token counted twice",
        CONTINUOUS,
        "        request.num_pending_tokens -= row.samples\n",
        "",
        SCHEDULING,
    ),
    Mutant(
        "overlap: blocks preempted while a step in flight uses them",
        CONTINUOUS,
        "if not self._outstanding[request.request_id] and request.request_id not in round_.rows",
        "if request.request_id not in round_.rows",
        OVERLAP,
    ),
    Mutant(
        "overlap: a followed request does not wait for its token",
        CONTINUOUS,
        "return request.request_id in self._unhurried or request.num_output_tokens",
        "return request.num_output_tokens",
        OVERLAP,
    ),
    Mutant("overlap: one buffer for all steps", STAGING, "IN_FLIGHT = 2", "IN_FLIGHT = 1", BATCH),
    Mutant(
        "overlap: a step that brings nothing is not waited for",
        RUNNER,
        "copy = self._parts.device.copy_to_host(tensors)",
        "copy = self._parts.device.copy_to_host(tensors) if tensors else __import__('quire.plugin').plugin.HostCopy(())",
        OVERLAP,
    ),
    Mutant(
        "overlap: the token is not kept for the next step",
        RUNNER,
        "        self._rows.store(inputs.places, result.token_ids)\n",
        "",
        OVERLAP,
    ),
    Mutant(
        "steps to tokens: the token is not kept for the next step",
        FORWARD,
        "            self._table.store(inputs.places, tokens.clamp(min=0))  # the next step reads one, whatever is wrong\n",
        "",
        GRAPHS,
    ),
    Mutant(
        "steps to tokens: an asynchronous device's results are overwritten",
        RUNNER,
        "choose = parts.pipeline.choose if graphs.lazy and not parts.device.runs_async else None",
        "choose = parts.pipeline.choose if graphs.lazy else None",
        GRAPHS,
    ),
    Mutant(
        "steps to tokens: what processors do is left out",
        PIPELINE,
        "                    if params.temperature > 0 or not processor.argmax_invariant:\n",
        "                    if params.temperature > 0:\n",
        GRAPHS,
    ),
    Mutant(
        "steps to tokens: a slot's next request is taken for its last one",
        PIPELINE,
        "        self._watched.discard(slot)\n",
        "",
        SAMPLING,
    ),
    Mutant(
        "decode steps: padding rows have a length",
        BUILDER,
        "for array in (rooms.positions, rooms.seq_lens, rooms.token_index)",
        "for array in (rooms.positions, rooms.token_index)",
        BATCH,
    ),
    Mutant(
        "decode steps: new blocks are not learnt of",
        BUILDER,
        "(self._rows.version, self._decoded)",
        "(0, self._decoded)",
        BATCH,
    ),
    Mutant(
        "decode steps: other rows' block tables are taken",
        BUILDER,
        "self._decoded = rooms.slots.tobytes()",
        "self._decoded = bytes(8 * count)",
        BATCH,
    ),
    Mutant(
        "moves: a row behind the last is read",
        f"{CSRC}/moves.cpp",
        "index[i] >= rows) return void(*failed = 1);\n        memcpy(out",
        "index[i] > rows) return void(*failed = 1);\n        memcpy(out",
        MOVES,
    ),
    Mutant(
        "moves: what lies apart is moved as if it did not",
        "plugins/cpu_native/quire_cpu_native/moves.py",
        "for each in (matrix, index, rows)",
        "for each in (index, rows)",
        MOVES,
    ),
    Mutant(
        "moves: what failed stays unsaid",
        "plugins/cpu_native/quire_cpu_native/recording.py",
        "        if self._failed.value:\n",
        "        if False:\n",
        MOVES,
    ),
    Mutant(
        "overlap: the next step is built on one that failed",
        "framework/quire/engine/engine.py",
        "len(self._flying) >= self._depth or future.done()",
        "len(self._flying) >= self._depth",
        OVERLAP,
    ),
    Mutant(
        "overlap: a step that fails when it is awaited ends all of its requests",
        RUNNER,
        "        if len(rows) == 1:\n            return\n        try:",
        "        if rows:\n            return\n        try:",
        OVERLAP,
    ),
    Mutant(
        "overlap: processors keep the tokens of a failed step",
        RUNNER,
        "            for row in anew:",
        "            for row in ():",
        OVERLAP,
    ),
    Mutant(
        "overlap: what was launched on the tokens of a failed step stands",
        RUNNER,
        "for step in later if launched.error is None else ():",
        "for step in ():",
        OVERLAP,
    ),
    Mutant(
        "rows: a slot keeps its last request's blocks",
        ROWS,
        "            self.block_table.index_fill_(0, deltas.cleared, 0)\n",
        "            pass\n",
        BATCH,
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
        "tl.load(query_start_ptr + num_rows), num_tokens",
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
        "kernel: parts are counted from the first tile, not the window's",
        KERNELS,
        "        low += part * chunk\n        high = tl.minimum(high, low + chunk)",
        "        high = tl.minimum(high, (part + 1) * chunk)\n        low = tl.maximum(low, part * chunk)",
        CUDA,
    ),
    Mutant(
        "kernel: a decode row is served as a prefill row too",
        KERNELS,
        "blocks = tl.where(is_decode, 0, (query_len + BLOCK_Q - 1) // BLOCK_Q)",
        "blocks = (query_len + BLOCK_Q - 1) // BLOCK_Q",
        CUDA_PROBE,
    ),
    Mutant(
        "kernel: prefill rows are planned as decode rows",
        KERNELS,
        "tiles = tl.where(is_decode, tiles, 0)",
        "tiles = tiles * 1",
        CUDA_PROBE,
    ),
    Mutant(
        "kernel: a step of equal rows takes the decode shape, however long they are",
        CUDA_ATTENTION,
        "(length <= space.decode_queries,) if length",
        "(True,) if length",
        CUDA_PROBE,
    ),
    Mutant(
        "kernel: ALiBi counts from the wrong end",
        KERNELS,
        "slopes[:, None] * (key.to(tl.float32)[None, :] - position.to(tl.float32)[:, None])",
        "slopes[:, None] * (position.to(tl.float32)[:, None] - key.to(tl.float32)[None, :])",
        CUDA,
    ),
    Mutant(
        "kernel: every head takes the first slope",
        KERNELS,
        "tl.load(slope_ptr + head,",
        "tl.load(slope_ptr + head * 0,",
        CUDA,
    ),
    Mutant(
        "kernel: what overflows an 8-bit cache is lost",
        ROW_KERNELS,
        "x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))",
        "x = tl.where(x > LARGEST, 0.0, tl.where(x < -LARGEST, 0.0, x))",
        CUDA,
    ),
    Mutant(
        "kernel: weights are rounded to the cache's 8 bits",
        KERNELS,
        "acc = tl.dot(weights.to(q.dtype), v,",
        "acc = tl.dot(weights.to(v_row.dtype.element_ty).to(q.dtype), v,",
        CUDA,
    ),
    Mutant(
        "kernel: 8-bit keys are read without their scale", CUDA_ATTENTION, "layer.scale * k_scale", "layer.scale", CUDA
    ),
    Mutant("kernel: 8-bit values are read without their scale", KERNELS, "acc * v_scale /", "acc /", CUDA),
    Mutant(
        "kernel: scales are taken from other caches too",
        CUDA_ATTENTION,
        "layer.cache_scales(keys.dtype)",
        "(layer.k_scale, layer.v_scale)",
        CUDA,
    ),
    Mutant(
        "kernel: 8-bit caches are written without their scale",
        ROW_KERNELS,
        "x = x.to(tl.float32) * inverse_scale",
        "x = x.to(tl.float32)",
        CUDA,
    ),
    Mutant(
        "kernel: keys are written with the scale of values",
        "plugins/cuda_paged/quire_cuda_paged/prepare.py",
        "for scale in layer.cache_scales(keys.dtype)",
        "for scale in layer.cache_scales(keys.dtype)[::-1]",
        CUDA,
    ),
    Mutant(
        "kv scales: the reference writes without them",
        "framework/quire/contract/attention.py",
        "x if scale == 1.0 else x.float() * (1 / scale)",
        "x",
        CPU_REF,
    ),
    Mutant(
        "kv scales: the reference reads values with the scale of keys",
        "plugins/cpu_ref/quire_cpu_ref/tiles.py",
        "k_scale, v_scale = beside or layer.cache_scales(keys.dtype)",
        "v_scale, k_scale = beside or layer.cache_scales(keys.dtype)",
        CPU_REF,
    ),
    Mutant(
        "kv scales: a checkpoint's are not given to attention",
        "framework/quire/models/decoder.py",
        "            layer.attention.layer = facts\n",
        "            del facts\n",
        "tests/models/test_kv_scales.py",
    ),
    Mutant(
        "kv scales: those of values are taken for those of keys",
        "framework/quire/layers/kv_scales.py",
        '[f"{match[3]}_scale"]',
        '["k_scale"]',
        "tests/models/test_kv_scales.py",
    ),
    Mutant(
        "sampling kernel: ties with the threshold are cut off",
        SAMPLING_KERNELS,
        "(_key(x) >= kept) & (weights >= min_p)",
        "((_key(x) > kept) | (kept == LOWEST_KEY)) & (weights >= min_p)",
        CUDA_SAMPLER,
    ),
    Mutant(
        "sampling kernel: the two zeros are told apart",
        SAMPLING_KERNELS,
        "tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)",
        "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        CUDA_SAMPLER,
    ),
    Mutant(
        "sampling kernel: top-p takes the mass of all tokens",
        SAMPLING_KERNELS,
        "sums = _block_sums(logits, largest, temperature, kept, 0.0, VOCAB, BLOCK, BLOCKS)",
        "sums = _block_sums(logits, largest, temperature, kept * 0 + LOWEST_KEY, 0.0, VOCAB, BLOCK, BLOCKS)",
        CUDA_SAMPLER,
    ),
    Mutant(
        "sampling kernel: the position's high word is dropped",
        SAMPLING_KERNELS,
        "(words >> 32).to(tl.uint32)",
        "(words >> 63).to(tl.uint32)",
        CUDA_SAMPLER,
    ),
    Mutant(
        "sampling kernel: the draw's block starts from zero",
        SAMPLING_KERNELS,
        "before = tl.sum(tl.where(block == chosen - 1, ends, 0.0), 0)",
        "before = tl.sum(tl.where(block == chosen, ends - sums, 0.0), 0) * 0.0",
        CUDA_SAMPLER,
    ),
    Mutant(
        "sampling kernel: a range shrinks past its threshold",
        SAMPLING_KERNELS,
        "tl.minimum(high, tl.max(most, 0).to(tl.int64) + 1)",
        "tl.minimum(high, tl.max(most, 0).to(tl.int64))",
        CUDA_SAMPLER,
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
        "kernel: sines lie as the cosines do",
        ROW_KERNELS,
        "sin_ptr + token * sin_row",
        "sin_ptr + token * cos_row",
        "tests/cuda_paged/test_cuda_prepare.py",
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
        "k = _as_cached(k, k_inverse, LARGEST)",
        "k = _as_cached(tl.load(qkv + HEADS * D + at, mask=inside, other=0.0), k_inverse, LARGEST)",
        CUDA,
    ),
    Mutant(
        "quant cuda: nibbles in the order of inputs",
        WORDS,
        "4 * (segment + 4 * half)",
        "4 * (2 * segment + half)",
        QUANT_WORDS,
    ),
    Mutant(
        "quant cuda: scales of the wrong group",
        WORDS,
        "first // group_size",
        "first // unit",
        QUANT_WORDS,
    ),
    Mutant(
        "quant cuda: a unit that a group ends within",
        WORDS,
        "if group_size % unit == 0",
        "if group_size >= unit",
        QUANT_WORDS,
    ),
    Mutant(
        "quant cuda: scales cut to float16",
        WORDS,
        "if torch.equal(scales.to(dtype).to(scales.dtype), scales):",
        "if True:",
        QUANT_WORDS,
    ),
    Mutant(
        "quant cuda: halves taken from the wrong bits",
        CODE_KERNELS,
        "(((shifted >> 16) & 0xF) | bits)",
        "(((shifted >> 4) & 0xF) | bits)",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: lop3 with another table",
        CODE_KERNELS,
        "0x43004300, 0xEA",
        "0x43004300, 0xE8",
        QUANT_WORDS,
    ),
    Mutant(
        "quant cuda: the offset stays in the sums",
        CODE_KERNELS,
        "(part - sums * zero[None, :])",
        "(part - sums * (zero - OFFSET)[None, :])",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: inputs beyond the last are read",
        CODE_KERNELS,
        "ok = ok & (k < inputs)[None, :]",
        "ok = ok",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: the first to arrive adds",
        CODE_KERNELS,
        'sem="acq_rel") == SPLIT - 1',
        'sem="acq_rel") == 0',
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: counters are left as they are",
        CODE_KERNELS,
        "            tl.store(count_ptr + counter, 0)\n",
        "",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: the bias is lost when inputs are split",
        CODE_KERNELS,
        "(total + bias).to(",
        "total.to(",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: wide products take the wrong inputs",
        CODE_KERNELS,
        "m, k - 32, rows",
        "m, k, rows",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: halves before segments",
        CODE_KERNELS,
        "both.permute(0, 3, 2, 1)",
        "both.permute(0, 2, 3, 1)",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: the deterministic split depends on the rows",
        CODE_LINEAR,
        "split = self._split(launch, MIN_BLOCK_M, state.words)",
        "split = self._split(launch, len(x), state.words)",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: every part is the first",
        CODE_LINEAR,
        "self._dequantized(words, start, end)",
        "self._dequantized(words, 0, end - start)",
        QUANT_CUDA,
    ),
    Mutant(
        "quant cuda: splits without work",
        CODE_LAUNCHES,
        "and input_tiles >= 2 * split * SPLIT_TILES",
        "and input_tiles >= split",
        QUANT_WORDS,
    ),
    Mutant(
        "quant: AWQ's columns in another order",
        "plugins/quant/quire_quant/awq.py",
        "ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
        "ORDER = (0, 4, 1, 5, 2, 6, 3, 7)",
        "tests/quant/test_bits.py",
    ),
    Mutant(
        "quant: one float8 scale for all that is fused",
        "plugins/quant/quire_quant/fp8.py",
        "scale = scale.flatten().repeat_interleave(torch.tensor(self._sizes, device=device))",
        "scale = scale.flatten().max().repeat(len(weight))",
        "tests/quant/test_detection.py",
    ),
    Mutant(
        "quant: the last rule that matches counts",
        "plugins/quant/quire_quant/gptq.py",
        "for rule, changes in self._rules.items():",
        "for rule, changes in reversed(self._rules.items()):",
        "tests/quant/test_detection.py",
    ),
    Mutant(
        "quant cuda: float8 rows are not padded",
        FLOAT8_LINEAR,
        "pad(x, (0, 0, 0, -len(x) % ROWS))",
        "x",
        QUANT_FLOAT8,
    ),
    Mutant(
        "quant cuda: float8 scales lie row by row",
        FLOAT8_LINEAR,
        "scales = scales.t() if groups > 1 else scales.view(rows, 1)",
        "scales = scales.t().contiguous()",
        QUANT_FLOAT8,
    ),
    Mutant(
        "quant cuda: the bias of blocks is lost",
        FLOAT8_LINEAR,
        "product[:rows] + bias if blocks and bias is not None else product[:rows]",
        "product[:rows]",
        QUANT_FLOAT8,
    ),
    Mutant(
        "quant cuda: float8 scales of another maximum",
        FLOAT8_KERNELS,
        "top / 448.0)",
        "top / 240.0)",
        QUANT_FLOAT8,
    ),
    Mutant(
        "quant cuda: scales of blocks without whole rows of four",
        SCALED_MM,
        "BLOCK_ROWS * BLOCK[1]",
        "BLOCK[1]",
        QUANT_FLOAT8,
    ),
)
