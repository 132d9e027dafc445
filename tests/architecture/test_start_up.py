"""What importing Quire costs, and what it must not pull in."""

from __future__ import annotations

import json
import subprocess
import sys

MEASURE = """
import json, sys, time
import torch
before, started = set(sys.modules), time.process_time()
import quire
seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "modules": sorted({m.split(".")[0] for m in set(sys.modules) - before})}))
"""

LIST = """
import json, sys
sys.argv = ["quire", "plugins", "list"]
from quire.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps({"code": code, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""

GENERATE = """
import json, sys
from quire import LLM, SamplingParams
from quire.layers import basic
basic.LARGE_TABLE = 1  # so that a tied embedding is read from the file
params = SamplingParams(max_tokens=5, ignore_eos=True)
tokens = LLM(None, num_kv_blocks=20).generate(["hello"], params, use_tqdm=False)[0].outputs[0].token_ids
print(json.dumps({"tokens": len(tokens), "modules": list(sys.modules)}))
"""

LIMIT = 1.5
"""Seconds of processor time beyond torch's own import."""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_quire_is_quick_and_light():
    best = run(MEASURE)
    for _ in range(2):  # the best of three: another process may have had the caches
        if best["seconds"] < LIMIT:
            break
        best = min(best, run(MEASURE), key=lambda measured: measured["seconds"])
    assert best["seconds"] < LIMIT
    forbidden = {"triton", "fastapi", "uvicorn", "transformers", "quire_cpu_ref", "quire_cuda_paged", "quire_server"}
    assert not forbidden & set(best["modules"])


def test_the_first_steps_do_not_wait_for_torchs_compiler():
    """Recording them uses what imports it unless told otherwise: seconds in the midst of an answer."""
    found = run(GENERATE)
    assert found["tokens"] == 5
    assert "torch._dynamo" not in found["modules"]


def test_listing_plugins_imports_no_model_library():
    found = run(LIST)
    assert found["code"] in (0, None)
    assert {"quire", "quire_cpu_ref"} <= set(found["modules"])
    assert not {"triton", "fastapi", "transformers", "tokenizers"} & set(found["modules"])
