"""The kit finds every plausible fault, for every point; here some of them, in full with `-m slow`."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kit_faults.table import FAULTS
from quire.contract.provider import POINTS

ROOT = Path(__file__).parents[2]
CHEAP = (
    "not causal", "plan is stale", "the null block is granted", "a step over its budget", "victim that was not offered",
    "one draw for all positions", "edits a copy", "last outputs skipped", "residual not added",
    "more memory free than there is", "the end is forgotten", "divides by an empty pool",
)  # fmt: skip


def outcomes(*arguments):
    answer = subprocess.run(
        [sys.executable, "scripts/kit_mutants.py", "--json", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout)


def test_every_point_has_faults_and_each_its_own_name():
    counts = Counter(fault.point for fault in FAULTS)
    assert set(counts) == set(POINTS)
    assert min(counts.values()) >= 4
    assert len({(fault.point, fault.name) for fault in FAULTS}) == len(FAULTS) >= 30


def test_cheap_faults_are_found():
    found = outcomes("--only", *CHEAP)
    assert {outcome["name"] for outcome in found} >= set(CHEAP)
    assert all(outcome["killed_by"].startswith("test_") for outcome in found)


@pytest.mark.slow
def test_every_fault_is_found():
    assert len(outcomes()) == len(FAULTS)
