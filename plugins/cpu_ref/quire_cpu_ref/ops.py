"""Every operation in plain torch; linears are packed for oneDNN where that is faster."""

from __future__ import annotations

from typing import Any

from quire.plugin import GatedActSpec, GraphSupport, LinearSpec, MoESpec, OpSet, OpSpec, RMSNormSpec, UnsupportedModel

from quire_cpu_ref.linear import DeterministicLinear, PackedLinear, TorchLinear, packs_well
from quire_cpu_ref.moe import TorchMoE
from quire_cpu_ref.pointwise import TorchGatedAct, TorchRMSNorm


class TorchOps(OpSet):
    """Serves every kind of spec, on any device."""

    kinds = frozenset({"rms_norm", "gated_act", "linear", "moe"})

    def graph_support(self, spec: OpSpec) -> GraphSupport:
        # Experts are chosen by the host, which has to know the router's choices.
        return GraphSupport.NEVER if isinstance(spec, MoESpec) else GraphSupport.ANY

    def build(self, spec: OpSpec) -> Any:
        if isinstance(spec, RMSNormSpec):
            return TorchRMSNorm(spec)
        if isinstance(spec, GatedActSpec):
            return TorchGatedAct(spec)
        if isinstance(spec, LinearSpec):
            return self._linear(spec)
        if isinstance(spec, MoESpec):
            return TorchMoE(spec)
        raise UnsupportedModel(f"operation {spec.kind!r} is not one of {sorted(self.kinds)}")

    def _linear(self, spec: LinearSpec) -> Any:
        packed = packs_well(spec, self.init.device)
        if spec.deterministic:
            return DeterministicLinear(spec, packed=packed)
        return PackedLinear(spec) if packed else TorchLinear(spec)
