"""Checks of an attention backend's results, against the oracle of `attention_problems`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.contract.attention import KV_DTYPES, AttentionBackend
from quire.testing.attention_harness import MAX_ROWS, AttentionHarness
from quire.testing.attention_problems import CASES, KV_TOLERANCE, LAYERS, TOLERANCE, Problem, make_layer
from quire.testing.batches import make_batch

LONG: tuple[tuple[Sequence[int], Sequence[int]], ...] = (
    ([1, 40, 1], [500, 300, 129]),
    ([1, 1, 1, 1], [517, 300, 129, 77]),
    ([3, 3], [601, 66]),
)
"""New tokens and context of each row, where contexts are long."""


class AttentionResults(AttentionHarness):
    """What every attention backend must hold. `examples`: random problems that are tried."""

    examples = 40

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("layer", LAYERS)
    def test_equals_the_oracle(self, backend_class: type[AttentionBackend], layer: str, case: str) -> None:
        """Every feature in every kind of batch, in float32, with NaN in all slots that nobody owns.

        If it fails: if only `window` fails, a query sees itself and sliding_window - 1 tokens before it; if `decode`
        fails and `prefill` does not, look at the position formula seq_len - query_len + j; if the result is not finite,
        a slot behind a row's end was read. A feature that is not meant to be served belongs out of the caps.
        """
        self.check(backend_class, Problem.make(make_layer(layer), CASES[case], torch.float32))

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_dtypes(self, backend_class: type[AttentionBackend], dtype: torch.dtype) -> None:
        """Every declared dtype, within its own rounding.

        If it fails: keep scores, softmax and sums in float32 and round once, at the end; or take the dtype out of the
        caps.
        """
        for layer in ("gqa", "softcap"):
            self.check(backend_class, Problem.make(make_layer(layer), CASES["mixed"], dtype))

    @pytest.mark.parametrize("case", ["decode", "mixed"])
    @pytest.mark.parametrize("kv_dtype", sorted(KV_DTYPES))
    def test_kv_dtypes(self, backend_class: type[AttentionBackend], kv_dtype: str, case: str) -> None:
        """A declared cache dtype: exact for numbers that it holds exactly, rounded for others, without overflow.

        If it fails: allocate what `kv_spec` says for `init.cache_dtype`, widen what is read to the compute dtype before
        it is multiplied, and limit what is written to the dtype's range (`quire.plugin.in_cache_dtype` does; of int8
        `quantize_kv`, whose scales are the third and fourth cache); or take the dtype out of `caps.kv_dtypes`.
        """
        if kv_dtype not in backend_class.caps.kv_dtypes:
            pytest.skip(f"does not declare the cache dtype {kv_dtype!r}")
        layer = make_layer("gqa")
        for dtype in sorted(backend_class.caps.dtypes & set(self.tolerance), key=str):
            exact = Problem.make(layer, CASES[case], dtype, stored=KV_DTYPES[kv_dtype])
            self.check(backend_class, exact, kv_dtype=kv_dtype)
        rounded = Problem.make(layer, CASES[case], torch.float32)
        self.check(backend_class, rounded, kv_dtype=kv_dtype, added=KV_TOLERANCE[kv_dtype])
        large = dataclasses.replace(rounded, values=[value * 1e4 for value in rounded.values])
        self.run(backend_class, large, kv_dtype=kv_dtype)  # which checks that all is finite

    @pytest.mark.parametrize("case", ["decode", "mixed"])
    def test_scales_of_8_bit_floats(self, backend_class: type[AttentionBackend], case: str) -> None:
        """The layer's scales: what is stored is k / k_scale and v / v_scale, and only in a cache of 8-bit floats.

        If it fails: take `layer.cache_scales(dtype of the cache)` where the cache is read, the keys' before softcap and
        softmax; a `write_kv` of one's own divides by them before it limits the range.
        """
        if "fp8_e4m3" not in backend_class.caps.kv_dtypes:
            pytest.skip("does not declare the cache dtype 'fp8_e4m3'")
        for name in ("gqa", "softcap"):
            layer = dataclasses.replace(make_layer(name), k_scale=0.3, v_scale=5.0)
            if backend_class.supports(layer, torch.float32, self.device, 16):
                continue
            exact = Problem.make(layer, CASES[case], torch.float32, stored=KV_DTYPES["fp8_e4m3"])
            self.check(backend_class, exact, kv_dtype="fp8_e4m3")
        self.check(backend_class, Problem.make(layer, CASES[case], torch.float32))
        wide = dataclasses.replace(exact, values=[value * 1e4 for value in exact.values])
        self.run(backend_class, wide, kv_dtype="fp8_e4m3")  # which checks that all is finite

    @pytest.mark.parametrize("block_size", [1, 3, 8, 32, 64])
    def test_block_sizes(self, backend_class: type[AttentionBackend], block_size: int) -> None:
        """Every block size that the caps admit.

        If it fails: compute a slot as block_table[row, position // block_size] * block_size + position % block_size; if
        some sizes cannot be served, list those that can in `caps.block_sizes`.
        """
        self.check(backend_class, Problem.make(make_layer("gqa"), CASES["mixed"], torch.float32, block_size=block_size))

    @pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256])
    def test_head_sizes(self, backend_class: type[AttentionBackend], head_dim: int) -> None:
        """Every head size that the caps admit, odd ones too.

        If it fails: mask what a tile has beyond the head's size, or list the sizes that are served in `caps.head_dims`.
        """
        self.check(backend_class, Problem.make(make_layer("gqa", head_dim), CASES["mixed"], torch.float32))

    @pytest.mark.parametrize("heads", [(14, 2), (5, 5), (24, 8), (9, 1)], ids=str)
    def test_head_counts(self, backend_class: type[AttentionBackend], heads: tuple[int, int]) -> None:
        """Any number of query heads for each KV head, powers of two or not.

        If it fails: query head h reads KV head h // (num_heads // num_kv_heads); mask what a tile has beyond the group.
        """
        layer = dataclasses.replace(make_layer("gqa"), num_heads=heads[0], num_kv_heads=heads[1])
        for case in ("decode", "mixed"):
            self.check(backend_class, Problem.make(layer, CASES[case], torch.float32))

    def test_a_full_batch(self, backend_class: type[AttentionBackend]) -> None:
        """As many rows as the backend was told to expect, with contexts at, before and behind a block's border.

        If it fails: size buffers by `init.max_num_reqs` and `init.max_num_tokens`; a context that fills its last block
        has no partial one.
        """
        lens = [1] * MAX_ROWS, [16 * (row // 3) + (-1, 0, 1)[row % 3] if row else 0 for row in range(MAX_ROWS)]
        self.check(backend_class, Problem.make(make_layer("gqa"), lens, torch.float32))

    @pytest.mark.parametrize(
        "lens", [CASES["decode"], CASES["mixed"], ([1, 2], [5, 17])], ids=["decode", "mixed", "few"]
    )
    def test_padding(self, backend_class: type[AttentionBackend], lens: tuple[Sequence[int], Sequence[int]]) -> None:
        """Padding rows and tokens change no real row, and come out finite.

        If it fails: a padding row has seq_len 0 and no query token: write zeros to `out` from query_start_loc[-1] on,
        and divide by no empty sum.
        """
        for layer in ("mha", "gqa", "window", "sinks"):
            facts = make_layer(layer)
            if layer in ("mha", "gqa") or not backend_class.supports(facts, torch.float32, self.device, 16):
                self.check(backend_class, Problem.make(facts, lens, torch.float32, padding=(3, 5)))

    def test_block_placement_does_not_matter(self, backend_class: type[AttentionBackend]) -> None:
        """The same problem over other blocks gives the same bits.

        If it fails: the order of summation follows physical blocks, or a block that the row does not own was read; go
        through the block table in the order of positions.
        """
        layer = make_layer("gqa")
        first = Problem.make(layer, CASES["mixed"], torch.float32, seed=1)
        second = dataclasses.replace(first, case=make_batch(*CASES["mixed"], seed=99))
        assert torch.equal(self.run(backend_class, first), self.run(backend_class, second))

    def test_repeatable(self, backend_class: type[AttentionBackend]) -> None:
        """The same call twice gives the same bits, whatever stale slots hold.

        If it fails: set what lies behind a row's end to zero before it is multiplied, for a mask cannot hide it; sum
        without atomics.
        """
        problem = Problem.make(make_layer("gqa"), CASES["mixed"], torch.float32)
        assert torch.equal(self.run(backend_class, problem), self.run(backend_class, problem, poison=1e4))

    @pytest.mark.parametrize("lens", LONG, ids=["mixed", "decode", "verification"])
    @pytest.mark.parametrize("layer", ["gqa", "window", "softcap", "sinks"])
    def test_long_context(
        self, backend_class: type[AttentionBackend], layer: str, lens: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        """Hundreds of tokens, where an error of a single position would drown in small cases.

        If it fails: a backend that cuts a long context into parts does so here, in odd numbers: look at the last part,
        and at what must count once and not per part, such as sinks.
        """
        self.check(backend_class, Problem.make(make_layer(layer), lens, torch.float32))

    def test_any_shape(self, backend_class: type[AttentionBackend]) -> None:
        """Random lengths, heads, windows, block sizes, padding.

        If it fails: hypothesis prints the smallest example that it found; run it alone as a `Problem`.
        """
        rows = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=6)

        @given(
            rows=rows,
            layer=st.sampled_from(sorted(LAYERS)),
            size=st.sampled_from([1, 4, 16]),
            padding=st.tuples(st.integers(0, 2), st.integers(0, 3)),
            seed=st.integers(0, 99),
        )
        @settings(max_examples=self.examples, deadline=None)
        def check(rows: list[tuple[int, int]], layer: str, size: int, padding: tuple[int, int], seed: int) -> None:
            lens = ([row[0] for row in rows], [row[1] for row in rows])
            facts = make_layer(layer, 16 if layer == "other v size" else 8)
            if backend_class.supports(facts, torch.float32, self.device, size):
                return
            problem = Problem.make(facts, lens, torch.float32, block_size=size, seed=seed, padding=padding)
            self.check(backend_class, problem)

        check()

    def test_values_of_neighbours_do_not_matter(self, backend_class: type[AttentionBackend]) -> None:
        """A row's bits do not change with what another request of the batch holds.

        If it fails: something is shared by the rows of a step, such as one maximum or one scale; take it per row and
        head.
        """
        first = Problem.make(make_layer("gqa"), CASES["decode"], torch.float32)
        keys = [row if index == 2 else torch.full_like(row, 1e3) for index, row in enumerate(first.keys)]
        second = dataclasses.replace(first, keys=keys)
        assert torch.equal(self.run(backend_class, first)[2], self.run(backend_class, second)[2])
