"""The table of seeded faults does not rot, and two cheap ones are run in full."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutant_table import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_can_still_be_seeded(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / mutant.tests).exists()


def test_names_are_unique_and_the_main_parts_covered():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
    kinds = Counter(mutant.name.split(":")[0] for mutant in MUTANTS)
    assert {"kv", "scheduler", "sampler", "batch"} <= set(kinds)


@pytest.mark.parametrize("name", ["batch: position off by one", "text: stop string shown"])
def test_the_script_shows_that_they_are_killed(name):
    answer = subprocess.run(
        [sys.executable, "scripts/mutants.py", "--only", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "1 killed, 0 survived" in answer.stdout
