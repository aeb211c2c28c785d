"""vLLM as the engine of Ray Data's actors: the code of docs/ray.md, which gives the tokens of `pyengine.Engine`."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from cases import NEW, WEIGHTS

import pyengine
from pyengine import Engine, SamplingParams, Tokenwise
from pyengine.worlds import reviews

PAGE = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
(CODE,) = [block for block in re.findall(r"(?:^(?: {4}.*)?\n)+", PAGE, re.MULTILINE) if "ray.data.llm" in block]
# On a CPU a worker takes one of Ray's CPUs, and each of four stages another; and what a small model needs.
ON_CPU = 'placement_group_config={"bundles": [{"CPU": 1}]}, concurrency=1, batch_size=8'
SMALL = '"dtype": "float32", "max_model_len": 512, "gpu_memory_utilization": 0.1, "enforce_eager": True'


def test_rows_of_a_job_are_tilted_inside_vllm(tmp_path):
    model, scorer = pyengine.embedded("policy"), pyengine.embedded("prefix")
    sampling = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    engine = Engine.from_pretrained(model, scorer=scorer)
    asked = [(prompt, weight) for prompt in reviews.prompts(8) for weight in WEIGHTS]
    wanted = engine.generate([prompt for prompt, _ in asked], [Tokenwise(weight) for _, weight in asked], sampling)
    rows = [{"id": i, "prompt": prompt, "weight": weight} for i, (prompt, weight) in enumerate(asked)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = f'"max_tokens": {NEW}, "temperature": 0, "ignore_eos": True'
    code = textwrap.dedent(CODE)
    for page, here in (
        ("MODEL", str(model)),
        ("SCORER", str(scorer)),
        ('"max_tokens": 64', greedy),
        ('"tilt_weight": 2.0', '"tilt_weight": row["weight"]'),
        ("engine_kwargs={", f"{ON_CPU},\n    engine_kwargs={{{SMALL}, "),
    ):
        assert code.count(page) == 1, page
        code = code.replace(page, here)
    (tmp_path / "page.py").write_text("import ray\n\nray.init(num_cpus=8, include_dashboard=False)\n" + code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    answers = [json.loads(line) for file in (tmp_path / "answers").iterdir() for line in file.read_text().splitlines()]
    found = {answer["id"]: answer["text"] for answer in answers}
    assert sorted(answer["id"] for answer in answers) == list(range(len(rows)))
    assert [found[i] for i in range(len(rows))] == [result.text for result in wanted]
    assert len(set(found.values())) > len(rows) // 2
