"""Choosing codes: the error that each method promises to lower, and what none may break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quire_quant.solve import Target, awq_scale, clipped, gptq, grid, output_error, round_to_nearest
from quire_quant.store import read, stored


def problem(inputs=256, outputs=64, tokens=600, seed=0):
    """A weight, and correlated inputs of which a few are far louder than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator) @ (mix + 0.3 * torch.eye(inputs))
    x[:, torch.randperm(inputs, generator=generator)[:6]] *= 12
    return torch.randn(outputs, inputs, generator=generator) * 0.05, x.t() @ x / tokens, x.abs().mean(0)


def rtn(weight, target):
    return round_to_nearest(weight, target, *grid(weight, target))


def awq(weight, moment, magnitude, target):
    """The weight that AWQ's codes and factors mean together."""
    scale = awq_scale([weight], moment, magnitude, target)
    return clipped(weight * scale, moment / torch.outer(scale, scale), target).weight() / scale


@pytest.mark.parametrize(
    "target", [Target(4, 128, True), Target(4, 64, False), Target(3, 128, False), Target(2, 64, False)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_gptq_loses_less_than_awq_and_awq_less_than_rounding(target, seed):
    weight, moment, magnitude = problem(seed=seed)
    rounded = output_error(weight, rtn(weight, target).weight(), moment)
    scaled = output_error(weight, awq(weight, moment, magnitude, target), moment)
    solved = output_error(weight, gptq(weight, moment, target).weight(), moment)
    assert solved < 0.85 * rounded
    assert scaled < 0.95 * rounded
    assert solved < scaled


def test_more_bits_lose_less():
    weight, moment, _ = problem()
    errors = [output_error(weight, gptq(weight, moment, Target(b, 128, True)).weight(), moment) for b in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_rounding_is_within_half_a_step_inside_the_range(bits, sym, seed):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0.0
    weight[1] = weight[1].abs()
    target = Target(bits, 32, sym)
    solution = rtn(weight, target)
    steps = solution.scales.float().repeat_interleave(32, 1)
    # Symmetric codes reach one step less upwards than downwards. A scale in float16 is off by 2^-11 of itself, and the
    # outermost code by as many steps.
    steps *= (1.0 if sym else 0.5) + target.largest * 2**-11 + 0.02
    assert ((solution.weight() - weight).abs() <= steps + 1e-6).all()
    assert solution.weight()[0].abs().max() == 0


def test_with_uncorrelated_inputs_gptq_is_rounding():
    weight, _, _ = problem()
    target = Target(4, 64, False)
    assert torch.equal(gptq(weight, torch.eye(256), target).codes, rtn(weight, target).codes)


def test_inputs_that_are_never_seen_and_moments_of_low_rank():
    weight, _, _ = problem()
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(3))
    x[:, 7] = 0
    solution = gptq(weight, x.t() @ x, Target(4, 64, True))
    assert torch.isfinite(solution.weight()).all()
    assert solution.weight()[:, 7].abs().max() == 0
    assert output_error(weight, solution.weight(), x.t() @ x) < 0.1


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_what_is_stored_is_read_again(method, bits, sym):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    weight[:, :32] = weight[:, :32].abs()  # zero points of 0, which the first form must wrap
    solution = rtn(weight, Target(bits, 32, sym))
    again = read(method, stored(method, solution), solution.target)
    assert torch.equal(again.codes, solution.codes)
    assert torch.equal(again.weight(), solution.weight())
