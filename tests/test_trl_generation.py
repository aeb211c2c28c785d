"""TRL's trainers that draw their own completions, drawing them blockwise by the engine: one line, and none of ours."""

from __future__ import annotations

import functools

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import pyengine
from pyengine.integrations.transformers import blockwise
from pyengine.worlds import reviews


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["grpo", "online-dpo"])
def test_what_is_trained_on_are_the_engines_best_branches(kind, tmp_path):
    path, branches, trained = pyengine.embedded("policy"), [], []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def scorer(prompts, completions):
        branches.extend([c.strip() for c in completions])
        return reviews.sentiment(prompts, completions)

    def reward(prompts, completions, **columns):
        trained.append([c.strip() for c in completions])
        return reviews.sentiment(prompts, completions)

    model.generate = functools.partial(
        model.generate, custom_generate=blockwise(scorer, tokenizer, k=3, block_tokens=16)
    )
    before = model.get_input_embeddings().weight.clone()
    data = Dataset.from_list([{"prompt": prompt} for prompt in reviews.prompts(8)])
    options = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-3}
    if kind == "grpo":
        args = GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=16, **options
        )
        trainer = GRPOTrainer(model, reward, args, data, processing_class=tokenizer)
    else:
        args = OnlineDPOConfig(str(tmp_path), per_device_train_batch_size=2, max_new_tokens=16, **options)
        trainer = OnlineDPOTrainer(
            model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer
        )
    trainer.train()
    assert [len(answers) for answers in trained] == [4, 4]  # two to each of two prompts
    assert len(branches) == 24
    groups = [branches[i : i + 3] for i in range(0, 24, 3)]
    best = [max(group, key=lambda text: reviews.sentiment([""], [text])[0]) for group in groups]
    assert sorted(best) == sorted(trained[0] + trained[1])
    assert len(set(branches)) > 12  # other draws at each place and step
    assert not model.get_input_embeddings().weight.equal(before)
