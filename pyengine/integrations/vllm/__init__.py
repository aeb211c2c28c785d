"""Tokenwise inside vLLM: each request may follow scorers, by the fields `tilt_*` of its `extra_args` (`vllm_xargs`).

    llm = LLM(model, additional_config={"tilt_scorers": {"helpful": "DIRECTORY"}})
    llm.generate(prompts, SamplingParams(extra_args={"tilt_weight": 2.0}))

Installed, it is loaded by vLLM itself: `register` as a general plug-in in every process, `TiltProcessor` as a logits
processor of both model runners. Without `tilt_scorers` nothing is loaded but this package.
"""

from pyengine.integrations.vllm.processor import TiltProcessor, register

__all__ = ["TiltProcessor", "register"]
