"""Runs vLLM engines one after another and writes what they said: python vllm_run.py JOB.json OUT.json.

JOB: {"engines": [{"args": of LLM, "calls": [{"prompts": [token ids], "params": [of SamplingParams]}]}]}. OUT: for each
engine its calls' outputs, the rows that were tilted and counters, or the error that it ended with. With V2=1 the V2
model runner, which on a CPU needs Triton's interpreter.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
if os.environ.get("V2") == "1":
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active():
            return True

    backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)


def filter_without_triton():
    """V2's filters by vLLM's own code in torch: its kernel for them does not run in Triton's interpreter."""
    from vllm.v1.sample.ops import topk_topp_sampler as ops

    ops.apply_top_k_top_p_triton = lambda logits, k, p: ops.apply_top_k_top_p_pytorch(logits, k, p, True)


COMMON = {"gpu_memory_utilization": 0.1, "dtype": "float32", "max_model_len": 512, "enforce_eager": True}


def said(output):
    """One request's samples."""
    found = []
    for sample in output.outputs:
        rows = [
            [row[token].logprob if token in row else None for token in range(max(row) + 1)]
            for row in sample.logprobs or []
        ]
        found.append({"tokens": list(sample.token_ids), "logprobs": rows, "finish": sample.finish_reason})
    return found


def watched(llm):
    """How often each request was given more than one token to read in a step, as its steps go by."""
    scheduler, pieces = llm.llm_engine.engine_core.engine_core.scheduler, {}
    theirs = scheduler.schedule

    def schedule(*args, **kwargs):
        output = theirs(*args, **kwargs)
        for request, count in output.num_scheduled_tokens.items():
            pieces[request] = pieces.get(request, 0) + (count > 1)
        return output

    scheduler.schedule = schedule
    return pieces


def preemptions(llm):
    return next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def structured(params):
    from vllm.sampling_params import StructuredOutputsParams

    regex = params.pop("regex", None)
    if "logit_bias" in params:  # JSON has no numbers for keys
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    return params | ({"structured_outputs": StructuredOutputsParams(regex=regex)} if regex else {})


def run(engine):
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    found = {"calls": []}
    llm = None
    if engine.get("blind"):  # a model that computes its logits without vLLM's layer
        from pyengine.integrations.vllm.private import OutputHead, ShowingHead

        ShowingHead.__init__, ShowingHead.forward = OutputHead.__init__, OutputHead.forward
    try:
        llm = LLM(**(COMMON | engine["args"]))
        config = llm.llm_engine.vllm_config
        found["v2"], found["compiled"] = config.use_v2_model_runner, config.compilation_config.mode != 0
        pieces = watched(llm)
        for call in engine["calls"]:
            start = time.perf_counter()
            prompts = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in call["prompts"]]
            try:
                params = [SamplingParams(**structured(p)) for p in call["params"]]
                outputs = llm.generate(prompts, params, use_tqdm=False)
                found["calls"].append([said(output) for output in outputs])
            except Exception as error:  # noqa: BLE001 - what is refused, the tests look at
                found["calls"].append({"error": f"{type(error).__name__}: {error}"})
            error = found["calls"][-1].get("error", "") if isinstance(found["calls"][-1], dict) else ""
            print(f"a call of {len(call['prompts'])} took {time.perf_counter() - start:.1f} s {error}", flush=True)
        if hasattr(type(llm.llm_engine.model_executor.driver_worker.worker), "tilted_rows"):
            found["tilted"] = llm.collective_rpc("tilted_rows")[0]
        if not engine["args"].get("disable_log_stats", True):
            found["preemptions"], found["pieces"] = preemptions(llm), pieces
    except Exception as error:  # noqa: BLE001
        found["error"] = f"{type(error).__name__}: {error}"
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    if os.environ.get("V2") == "1":
        filter_without_triton()
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(engine) for engine in job["engines"]]))
