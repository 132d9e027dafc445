"""Paged attention in Triton: one source, compiled in two shapes.

*Decode* (SPLIT): a program serves one row's few query tokens over one part of its KV; the parts are
put together by `combine_kernel`. *Prefill*: a program serves a block of query tokens over all of their
KV. In both the query heads that share a KV head stand side by side in one matrix, so that each key is
read once for all of them. The softmax is the online one (Milakov and Gimelshein 2018, Dao et al. 2022)
in base 2; the split is flash-decoding's (Dao et al. 2023).

Arithmetic is float32; Triton's interpreter computes bfloat16 wrongly otherwise. Block ids are widened
to 64 bits before they are multiplied: a large pool has more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_rows", "target"])
def plan_kernel(
    query_start_ptr,
    seq_lens_ptr,
    split_start_ptr,
    block_start_ptr,
    chunk_ptr,
    num_rows,
    target,
    DECODE_QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Share a step's work out: the KV of decode rows in parts of equal length, other rows' queries in blocks.

    One program per step. Parts are about `target` in all: as the sum of ceil(tiles / chunk) is at most
    target + num_rows, the grid of the kernel that follows depends on the number of rows alone. No length
    is asked of the host, so that a captured graph serves every step of its size.

    Args:
        query_start_ptr: int32 [num_rows + 1]. seq_lens_ptr: int32 [num_rows].
        split_start_ptr: int32 [num_rows + 1], out; the parts of rows before each; other rows have none.
        block_start_ptr: int32 [num_rows + 1], out; the query blocks of rows before each; decode rows have none.
        chunk_ptr: int32 [1], out; tiles per part. target: parts wanted.
        DECODE_QUERIES: most query tokens of a decode row. BLOCK_Q: query tokens of a block.
        WINDOW: as in `paged_attention_kernel`; tiles before it are no work. ROWS: power of two, at least num_rows.
    """
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    first_token = tl.load(query_start_ptr + row, mask=is_row, other=0)
    query_len = tl.load(query_start_ptr + 1 + row, mask=is_row, other=0) - first_token
    length = tl.load(seq_lens_ptr + row, mask=is_row, other=0)
    is_decode = query_len <= DECODE_QUERIES
    tiles = (length + TILE - 1) // TILE - _first_tile(length - query_len, WINDOW, TILE)
    tiles = tl.where(is_decode, tiles, 0)
    total = tl.sum(tiles, 0)
    chunk = tl.maximum((total + target - 1) // target, MIN_TILES)
    splits = (tiles + chunk - 1) // chunk
    blocks = tl.where(is_decode, 0, (query_len + BLOCK_Q - 1) // BLOCK_Q)
    tl.store(split_start_ptr + 1 + row, tl.cumsum(splits, 0), mask=is_row)
    tl.store(split_start_ptr, 0)
    tl.store(block_start_ptr + 1 + row, tl.cumsum(blocks, 0), mask=is_row)
    tl.store(block_start_ptr, 0)
    tl.store(chunk_ptr, chunk)


@triton.jit
def _first_tile(position, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The first tile that a query at this position sees something of."""
    return tl.maximum(position - WINDOW + 1, 0) // TILE if WINDOW > 0 else position * 0


@triton.jit
def _last_not_after(starts_ptr, place, count):
    """The largest i below `count` with starts[i] <= place, by bisection."""
    low = 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _block_ids(table, start, in_tile, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """int64 block ids of the positions start + in_tile: one if a tile lies within a block, else [TILE]."""
    ids, width = table
    place = start // BLOCK_SIZE if BLOCK_SIZE % TILE == 0 else (start + in_tile) // BLOCK_SIZE
    return tl.load(ids + tl.minimum(place, width - 1)).to(tl.int64)


@triton.jit
def _row(cache, block, slot, kv_head):
    """Where slots of a cache begin: pointers to their first elements."""
    pointer, block_stride, slot_stride, head_stride = cache
    return pointer + (block * block_stride + kv_head * head_stride + slot * slot_stride)


@triton.jit
def _load(row, known, IS_KEY: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """A tile of a cache: of the keys [D_PAD, TILE], of the values [TILE, D_PAD]."""
    along: tl.constexpr = 0 if IS_KEY else 1  # where the axis that is not the positions' goes
    d = tl.expand_dims(tl.arange(0, D_PAD), 1 - along)
    at = tl.expand_dims(row, along) + d
    if MASKED:
        return tl.load(at, mask=tl.expand_dims(known, along) & (d < D), other=0.0)
    if D == D_PAD:
        return tl.load(at)
    return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def _scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2 of the products of queries and keys."""
    if SOFTCAP:  # scale is over the cap; tanh by exp2, which the GPU has in hardware
        capped = products * scale
        return (1.0 - 2.0 / (tl.exp2(capped * (2.0 * LOG2E)) + 1.0)) * softcap * LOG2E
    return products * scale  # scale is times log2(e)


@triton.jit
def _attend(
    state, q, keys, values, table, tiles, kv_head, queries, kv_end, scale, softcap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take tiles of KV into the running softmax.

    Args:
        state: (weighted values [BLOCK_M, DV_PAD], maximum [BLOCK_M], sum of weights [BLOCK_M]) so far; returned.
        q: [BLOCK_M, D_PAD]. keys, values: (cache, strides of block, slot and head). table: (ids, width).
        tiles: (first, last + 1). queries: (position [BLOCK_M], whether it is one, ALiBi slope).
    """
    acc, maximum, total = state
    position, row_ok, slopes = queries
    first_tile, last_tile = tiles
    in_tile = tl.arange(0, TILE)
    # The next tile's block ids are loaded one turn ahead: the loads of K and V then have plain addresses,
    # which Triton's pipeliner keeps more of in flight than loads through a table.
    block = _block_ids(table, first_tile * TILE, in_tile, BLOCK_SIZE, TILE)
    for tile in tl.range(first_tile, last_tile):
        start = tile * TILE
        key = start + in_tile
        known = key < kv_end
        slot = start % BLOCK_SIZE + in_tile if BLOCK_SIZE % TILE == 0 else key % BLOCK_SIZE
        k_row, v_row = _row(keys, block, slot, kv_head), _row(values, block, slot, kv_head)
        block = _block_ids(table, start + TILE, in_tile, BLOCK_SIZE, TILE)
        k = _load(k_row, known, True, MASKED, D, D_PAD).to(q.dtype)
        v = _load(v_row, known, False, MASKED, DV, DV_PAD).to(q.dtype)
        scores = _scores(tl.dot(q, k, input_precision=PRECISION), scale, softcap, SOFTCAP)
        if ALIBI:
            scores += slopes[:, None] * (key.to(tl.float32)[None, :] - position.to(tl.float32)[:, None])
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & row_ok[:, None] & known[None, :]
            if WINDOW > 0:
                seen = seen & (position[:, None] - key[None, :] < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(maximum - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        maximum = new_maximum
    return acc, maximum, total


@triton.jit
def _clear_padding(
    out_ptr, query_start_ptr, num_rows, num_tokens, out_token, head,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Padding tokens must come out finite: those behind the last row's get 0, in the heads of one KV head."""
    m = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, DV_PAD)
    clear = (m < GROUP)[:, None] & (dv < DV)[None, :]
    for token in tl.range(tl.load(query_start_ptr + num_rows), num_tokens):
        place = (tl.zeros([BLOCK_M], tl.int64) + token) * out_token + head * DV
        tl.store(
            out_ptr + place[:, None] + dv[None, :], tl.zeros([BLOCK_M, DV_PAD], out_ptr.dtype.element_ty), mask=clear
        )


@triton.jit
def _tiles(
    context, first_query, query_len, kv_end, part, chunk_ptr,
    BLOCK_Q: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(low, clear_low, clear_high, high): of tiles [low, high) every query sees [clear_low, clear_high) whole.

    Args:
        context: positions before the row's queries. first_query: of the block, within the row.
        kv_end: behind the last position that the block sees. part: with SPLIT, of the row's tiles.
    """
    begin = context + first_query
    low = _first_tile(begin, WINDOW, TILE)
    high = (kv_end + TILE - 1) // TILE
    if SPLIT:
        chunk = tl.load(chunk_ptr)
        low += part * chunk
        high = tl.minimum(high, low + chunk)
    clear_high = tl.maximum(tl.minimum((begin + 1) // TILE, high), low)
    clear_low = low
    if WINDOW > 0:
        last = context + tl.minimum(first_query + BLOCK_Q, query_len) - 1
        clear_low = tl.minimum(tl.maximum((tl.maximum(last - WINDOW + 1, 0) + TILE - 1) // TILE, low), clear_high)
    return low, clear_low, clear_high, high


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "table_width", "table_row"])
def paged_attention_kernel(
    out_ptr,
    part_ptr,
    part_lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    work_start_ptr,
    chunk_ptr,
    sink_ptr,
    slope_ptr,
    num_rows,
    num_tokens,
    scale,
    softcap,
    v_scale,
    table_width,
    table_row,
    q_token,
    out_token,
    k_block: tl.int64,
    k_slot,
    k_head,
    v_block: tl.int64,
    v_slot,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of `num_rows` rows; grid (work, KV heads).

    Args:
        out_ptr: [T, HEADS, DV]. q_ptr: [T, HEADS, D]. k_ptr, v_ptr: caches, any strides, elements of a head together.
        part_ptr: float32 [work, HEADS, BLOCK_Q, DV_PAD]; part_lse_ptr: float32 [work, HEADS, BLOCK_Q]; SPLIT only.
        table_ptr: int32 [num_rows, table_width]. seq_lens_ptr: int32 [num_rows].
        query_start_ptr: int32 [num_rows + 1], places in q and out; the last is the end of the real tokens.
        work_start_ptr, chunk_ptr: of `plan_kernel`, parts with SPLIT, else blocks.
        sink_ptr, slope_ptr: float32 [HEADS], for SINKS and ALIBI.
        num_tokens: tokens; those behind the end get 0.
        scale: factor on products of q and the cache's keys. v_scale: on the cache's values.
        WINDOW: tokens that a query sees, itself included; 0: all.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    work = tl.program_id(0)
    kv_head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, DV_PAD)
    head = kv_head * GROUP + m % GROUP
    if work == 0:
        _clear_padding(out_ptr, query_start_ptr, num_rows, num_tokens, out_token, head, GROUP, BLOCK_M, DV, DV_PAD)
    if work >= tl.load(work_start_ptr + num_rows):
        return
    row = _last_not_after(work_start_ptr, work, num_rows + 1)
    place = work - tl.load(work_start_ptr + row)
    part = place if SPLIT else 0
    query_block = 0 if SPLIT else place
    first_token = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - first_token
    seq_len = tl.load(seq_lens_ptr + row)
    context = seq_len - query_len

    query = query_block * BLOCK_Q + m // GROUP
    row_ok = (m < BLOCK_Q * GROUP) & (query < query_len)
    position = context + query
    d = tl.arange(0, D_PAD)
    token = (first_token + query).to(tl.int64)
    q_at = (token * q_token)[:, None] + (head * D)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)

    first_query = query_block * BLOCK_Q
    kv_end = tl.minimum(context + first_query + BLOCK_Q, seq_len)
    low, clear_low, clear_high, high = _tiles(
        context, first_query, query_len, kv_end, part, chunk_ptr, BLOCK_Q, TILE, SPLIT, WINDOW
    )
    qk_scale = scale * LOG2E
    if SOFTCAP:
        qk_scale = scale / softcap
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        if part == 0:  # a sink is one more position, which gives no value
            maximum = tl.load(sink_ptr + head, mask=m < BLOCK_Q * GROUP, other=0.0) * LOG2E
            total = tl.full([BLOCK_M], 1.0, tl.float32)
    slopes = maximum
    if ALIBI:
        slopes = tl.load(slope_ptr + head, mask=m < BLOCK_Q * GROUP, other=0.0) * LOG2E
    state = tl.zeros([BLOCK_M, DV_PAD], tl.float32), maximum, total
    keys = k_ptr, k_block, k_slot, k_head
    values = v_ptr, v_block, v_slot, v_head
    table = table_ptr + row.to(tl.int64) * table_row, table_width
    queries = position, row_ok, slopes
    if WINDOW > 0:
        state = _attend(
            state, q, keys, values, table, (low, clear_low), kv_head, queries, kv_end, qk_scale, softcap,
            True, WINDOW, SOFTCAP, ALIBI, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, PRECISION,
        )  # fmt: skip
    state = _attend(
        state, q, keys, values, table, (clear_low, clear_high), kv_head, queries, kv_end, qk_scale, softcap,
        False, WINDOW, SOFTCAP, ALIBI, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, PRECISION,
    )  # fmt: skip
    acc, maximum, total = _attend(
        state, q, keys, values, table, (clear_high, high), kv_head, queries, kv_end, qk_scale, softcap,
        True, WINDOW, SOFTCAP, ALIBI, BLOCK_SIZE, TILE, D, D_PAD, DV, DV_PAD, PRECISION,
    )  # fmt: skip
    acc = acc * v_scale / tl.where(total == 0.0, 1.0, total)[:, None]
    alone = True
    if SPLIT:
        alone = tl.load(work_start_ptr + row + 1) - tl.load(work_start_ptr + row) == 1
    if alone:
        at = (token * out_token)[:, None] + (head * DV)[:, None] + dv[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (dv < DV)[None, :])
    else:
        item = (work.to(tl.int64) * HEADS + head) * BLOCK_Q + m // GROUP
        tl.store(part_ptr + item[:, None] * DV_PAD + dv[None, :], acc, mask=row_ok[:, None])
        lse = tl.where(total == 0.0, float("-inf"), maximum + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(part_lse_ptr + item, lse, mask=row_ok)


@triton.jit
def combine_kernel(
    out_ptr,
    part_ptr,
    part_lse_ptr,
    query_start_ptr,
    split_start_ptr,
    out_token,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Put the parts of each row together; grid (rows, heads). Rows of one part are in `out` already."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    first_part = tl.load(split_start_ptr + row)
    num_parts = tl.load(split_start_ptr + row + 1) - first_part
    first_token = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - first_token
    if num_parts > 1:
        dv = tl.arange(0, DV_PAD)
        for query in tl.range(0, query_len):
            maximum = float("-inf")
            total = 0.0
            acc = tl.zeros([DV_PAD], tl.float32)
            for part in tl.range(0, num_parts):
                at = ((first_part + part).to(tl.int64) * HEADS + head) * BLOCK_Q + query
                lse = tl.load(part_lse_ptr + at)
                new_maximum = tl.maximum(maximum, lse)
                safe = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                shrink = tl.exp2(maximum - safe)
                weight = tl.exp2(lse - safe)
                acc = acc * shrink + tl.load(part_ptr + at * DV_PAD + dv) * weight
                total = total * shrink + weight
                maximum = new_maximum
            at = (first_token + query).to(tl.int64) * out_token + head * DV + dv
            result = acc / tl.where(total == 0.0, 1.0, total)
            tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=dv < DV)
