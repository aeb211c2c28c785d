"""The settings beside which scorers inside vLLM are refused, each alone, on stand-ins for its configuration."""

from types import SimpleNamespace

import pytest

from pyengine.errors import InputError
from pyengine.integrations.vllm.processor import refuse, refuse_reading

GOOD = {
    "parallel_config": {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "world_size": 1},
    "model_config": {
        "runner_type": "generate", "is_diffusion": False, "enable_prompt_embeds": False, "is_multimodal_model": False,
    },
    "scheduler_config": {"async_scheduling": True},
    "speculative_config": None,
    "lora_config": None,
    "use_v2_model_runner": True,
}  # fmt: skip
REFUSED = [
    ("speculative decoding", {"speculative_config": object()}),
    ("tensor parallelism", {"parallel_config": {"tensor_parallel_size": 2, "world_size": 2}}),
    ("pipeline parallelism", {"parallel_config": {"pipeline_parallel_size": 2, "world_size": 2}}),
    ("a replica of 2 workers", {"parallel_config": {"world_size": 2}}),
    ("LoRA", {"lora_config": object()}),
    ("runner='pooling'", {"model_config": {"runner_type": "pooling"}}),
    ("diffusion models", {"model_config": {"is_diffusion": True}}),
]
UNREAD = [
    ("prompts given as embeddings", {"model_config": {"enable_prompt_embeds": True}}),
    ("the tokens of an image", {"model_config": {"is_multimodal_model": True}}),
    ("set async_scheduling=False", {"use_v2_model_runner": False}),
]


def configuration(changed):
    """As vLLM's, good but for what is changed."""
    made = {k: v | changed.get(k, {}) if isinstance(v, dict) else changed.get(k, v) for k, v in GOOD.items()}
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in made.items()})


@pytest.mark.parametrize(("says", "changed"), REFUSED)
def test_a_setting_under_which_a_row_could_go_untilted_is_refused(says, changed):
    with pytest.raises(InputError, match=says):
        refuse(configuration(changed))


@pytest.mark.parametrize(("says", "changed"), UNREAD)
def test_a_setting_under_which_tokens_cannot_be_read_is_refused_of_a_scorer_that_reads(says, changed):
    refuse(configuration(changed))
    with pytest.raises(InputError, match=f"scorer 'guide' reads tokens: .*{says}"):
        refuse_reading(configuration(changed), "guide")


def test_other_settings_are_not_refused():
    from vllm.config import ParallelConfig, SchedulerConfig

    refuse(configuration({}))
    refuse_reading(configuration({}), "guide")
    synchronous = configuration({"use_v2_model_runner": False, "scheduler_config": {"async_scheduling": False}})
    refuse_reading(synchronous, "guide")
    several = ParallelConfig(prefill_context_parallel_size=2, distributed_executor_backend="mp")
    assert (ParallelConfig().world_size, several.world_size) == (1, 2)  # the names are vLLM's
    assert hasattr(SchedulerConfig, "async_scheduling")
