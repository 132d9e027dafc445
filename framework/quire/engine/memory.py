"""How many KV blocks the pool gets."""

from __future__ import annotations

import logging

from quire.contract.executor import KVBudget
from quire.errors import OutOfMemory
from quire.resolve import ResolvedConfig

logger = logging.getLogger(__name__)


def num_kv_blocks(config: ResolvedConfig, budget: KVBudget) -> int:
    """Blocks in the pool, the null block included.

    Raises:
        OutOfMemory: what is asked for, or the least that can serve one request, does not fit.
    """
    said = config.config
    if said.num_kv_blocks is not None:
        return _fitting(said.num_kv_blocks, budget, "num_kv_blocks")
    if isinstance(said.kv_cache_memory, int):
        return _fitting(said.kv_cache_memory // budget.bytes_per_block, budget, "kv_cache_memory")
    per_request = -(-config.max_model_len // config.block_size)
    wanted = per_request * config.max_num_seqs + 1
    allowed = int(budget.free_bytes * budget.kv_share) // budget.bytes_per_block
    blocks = min(wanted, allowed)
    if blocks < 2:
        raise OutOfMemory(
            f"{budget.free_bytes / 2**30:.2f} GiB are free; the {budget.kv_share:.0%} of it that may become the pool "
            "hold no KV block of "
            f"{budget.bytes_per_block / 2**20:.1f} MiB",
            remedy="free memory, use a smaller block_size, or set kv_cache_memory",
        )
    if blocks < per_request + 1:
        logger.warning(
            "the KV pool holds %d tokens, fewer than max_model_len %d; longer requests end early or are refused",
            (blocks - 1) * config.block_size,
            config.max_model_len,
        )
    return blocks


def _fitting(blocks: int, budget: KVBudget, field: str) -> int:
    needed = blocks * budget.bytes_per_block
    if blocks < 2 or needed > budget.free_bytes:
        raise OutOfMemory(
            f"{field} asks for {blocks} KV blocks, {needed / 2**30:.2f} GiB; "
            f"at least 2 blocks are needed and {budget.free_bytes / 2**30:.2f} GiB are free",
            remedy=f"change {field}, or leave it at auto",
        )
    return blocks
