"""Faulty samplers and logits processors."""

from __future__ import annotations

import dataclasses

import torch
from quire.plugin import LogitsProcessor, Sampler, SamplingParams
from quire.sampling.processors import Penalties
from quire.sampling.sampler import TorchSampler

from kit_faults.fault import Fault


class IgnoresTemperature(TorchSampler):
    def sample(self, logits, batch):
        warm = torch.where(batch.temperature > 0, 1.0, 0.0)
        return super().sample(logits, dataclasses.replace(batch, temperature=warm))


class Biased(TorchSampler):
    """Adds a tenth to the first token's logit, as a wrong cumulative sum does."""

    def sample(self, logits, batch):
        logits[batch.temperature > 0, 0] += 0.1
        return super().sample(logits, batch)


class CutsTopPShort(TorchSampler):
    """Leaves out the token that crosses top_p."""

    def sample(self, logits, batch):
        return super().sample(logits, dataclasses.replace(batch, top_p=torch.where(batch.top_p < 1, 0.6, 1.0)))


class DrawsInTurn(TorchSampler):
    """One generator for the batch: a row's draw depends on its place."""

    def sample(self, logits, batch):
        places = torch.arange(len(batch.seeds), device=batch.seeds.device)
        return super().sample(logits, dataclasses.replace(batch, positions=batch.positions + places))


class IgnoresPositions(TorchSampler):
    """The same draw for every token of a request."""

    def sample(self, logits, batch):
        return super().sample(logits, dataclasses.replace(batch, positions=torch.zeros_like(batch.positions)))


class SlowSeeds(TorchSampler):
    """Neighbouring seeds share a generator."""

    def sample(self, logits, batch):
        return super().sample(logits, dataclasses.replace(batch, seeds=batch.seeds // 4))


class TakesLastOfEquals(TorchSampler):
    def sample(self, logits, batch):
        tokens = super().sample(logits.clone(), batch)
        last = logits.shape[1] - 1 - logits.flip(1).argmax(-1)
        return torch.where(batch.temperature > 0, tokens, last)


class Overflows(Sampler):
    """Right but for the maximum, which it does not subtract."""

    def sample(self, logits, batch):
        inner = TorchSampler(self.init)
        exact = inner.sample(logits.clone(), batch)
        return torch.where(logits.exp().sum(-1).isfinite(), exact, 0)


class Chooses(TorchSampler):
    """Right, with a `choose` of its own."""

    def choose(self, logits, batch):
        return torch.where(logits.isfinite().all(-1), self.sample(logits.float(), batch), -1).to(torch.int32)


class MissesNan(Chooses):
    """Compares the largest with infinity, as if NaN were smaller."""

    def choose(self, logits, batch):
        return super().choose(logits.nan_to_num(nan=-1e9, posinf=torch.inf, neginf=-torch.inf), batch)


class RoundsToChoose(Chooses):
    """Rounds before it compares."""

    def choose(self, logits, batch):
        return super().choose(logits.round() if batch.all_greedy else logits, batch)


class ChoosesGreedily(Chooses):
    """Takes the largest, whatever the temperature."""

    def choose(self, logits, batch):
        return super().choose(logits, dataclasses.replace(batch, temperature=batch.temperature * 0, all_greedy=True))


class ChoosesNarrow(Chooses):
    """Divides in the logits' own dtype."""

    def choose(self, logits, batch):
        if batch.all_greedy:
            return super().choose(logits, batch)
        warm = batch.temperature.clamp(min=1e-3).to(logits.dtype)[:, None]
        return super().choose(logits / warm, dataclasses.replace(batch, temperature=(batch.temperature > 0).float()))


class ChoosesInPlace(Chooses):
    """Overwrites the logits."""

    def choose(self, logits, batch):
        tokens = super().choose(logits, batch)
        logits[:, 0] = 0.0
        return tokens


class KeepsTop(LogitsProcessor):
    """Right: leaves the most likely tokens, and only where it is asked to."""

    argmax_invariant = True
    extra_args = frozenset({"keep"})

    def __init__(self, init):
        super().__init__(init)
        self.keep = {}

    def add(self, slot, request):
        if "keep" not in (request.params.extra_args or {}):
            return False
        self.keep[slot] = request.params.extra_args["keep"]
        return True

    def remove(self, slot):
        del self.keep[slot]

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            logits[row, logits[row] < logits[row].topk(self.keep[slot]).values[-1]] = float("-inf")


class KeepsSecond(KeepsTop):
    """The most likely token goes."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        logits[torch.arange(len(logits)), logits.argmax(-1)] = float("-inf")


class CountsRows(Penalties):
    """State belongs to the row's place, not to its slot."""

    def apply(self, logits, ctx):
        super().apply(logits, dataclasses.replace(ctx, slots=sorted(ctx.slots)))


class ReadsAhead(LogitsProcessor):
    """Reads the buffer behind the known tokens."""

    def add(self, slot, request):
        return request.params.presence_penalty != 0

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            logits[row, ctx.token_ids[slot].unique().long()] -= 1.0


class NeverForgets(KeepsTop):
    """A slot's first request stays in force."""

    def add(self, slot, request):
        return slot in self.keep or super().add(slot, request)

    def remove(self, slot):
        pass


class StartsAnew(LogitsProcessor):
    """Counts its own calls, which a preempted request's return sets back."""

    def __init__(self, init):
        super().__init__(init)
        self.calls = {}

    def add(self, slot, request):
        self.calls[slot] = 0
        return request.params.presence_penalty != 0

    def remove(self, slot):
        del self.calls[slot]

    def apply(self, logits, ctx):
        for row, slot in enumerate(ctx.slots):
            self.calls[slot] += 1
            logits[row, self.calls[slot]] = float("-inf")


class AlwaysActive(Penalties):
    """Claims work for requests that ask for nothing."""

    def add(self, slot, request):
        super().add(slot, request)
        return True


class MakesNaN(KeepsTop):
    """The row cannot be sampled any more."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        logits.sub_(logits.clone())


class WritesTokens(KeepsTop):
    """The token buffer is the runner's."""

    def apply(self, logits, ctx):
        super().apply(logits, ctx)
        ctx.token_ids.zero_()


class ReturnsACopy(KeepsTop):
    """Edits a copy of the logits, which nobody looks at."""

    def apply(self, logits, ctx):
        super().apply(logits.clone(), ctx)


KEEP = {"active_params": tuple(SamplingParams(extra_args={"keep": keep}) for keep in (1, 4, 12))}
PENALTIES = {"active_params": Penalties.conformance["active_params"]}
PRESENCE = {"active_params": (SamplingParams(presence_penalty=1.0),)}

FAULTS = (
    Fault("temperature ignored", "sampler", IgnoresTemperature),
    Fault("biased by a tenth of a logit", "sampler", Biased),
    Fault("top_p without the token that crosses it", "sampler", CutsTopPShort),
    Fault("draws depend on the row's place", "sampler", DrawsInTurn),
    Fault("one draw for all positions", "sampler", IgnoresPositions),
    Fault("neighbouring seeds draw alike", "sampler", SlowSeeds),
    Fault("greedy takes the last of equals", "sampler", TakesLastOfEquals),
    Fault("exp overflows", "sampler", Overflows),
    Fault("NaN passes for finite", "sampler", MissesNan),
    Fault("choose rounds", "sampler", RoundsToChoose),
    Fault("choose takes the largest", "sampler", ChoosesGreedily),
    Fault("choose divides in bfloat16", "sampler", ChoosesNarrow),
    Fault("choose overwrites", "sampler", ChoosesInPlace),
    Fault("argmax_invariant is a lie", "logits_processor", KeepsSecond, KEEP),
    Fault("state by row, not by slot", "logits_processor", CountsRows, PENALTIES),
    Fault("reads stale tokens", "logits_processor", ReadsAhead, PRESENCE),
    Fault("a slot's state leaks to the next request", "logits_processor", NeverForgets, KEEP),
    Fault("preemption starts the count anew", "logits_processor", StartsAnew, PRESENCE),
    Fault("claims work where there is none", "logits_processor", AlwaysActive, PENALTIES),
    Fault("logits become NaN", "logits_processor", MakesNaN, KEEP),
    Fault("writes the token buffer", "logits_processor", WritesTokens, KEEP),
    Fault("edits a copy", "logits_processor", ReturnsACopy, KEEP),
)
