"""Reward models of every kind: the head at the last token, of a text in the form that was trained on."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from pyengine import Blockwise, Engine, FunctionScorer, InputError, RewardModel, SamplingParams, load_scorer
from pyengine.codec import PromptKey
from pyengine.reader import reader_of
from pyengine.scorers import Candidates

SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, intermediate_size=96, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=320, num_labels=1, bos_token_id=0, eos_token_id=0
    ),
}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=96),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, intermediate_size=96, pad_token_id=1),
    "deberta": lambda: transformers.DebertaV2Config(**SIZES, intermediate_size=96),
}
T5GEMMA = {name: SIZES[name] for name in SIZES if name != "num_labels"}
T5GEMMA |= {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
TIED = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
OTHERS = {
    "ctrl": lambda: transformers.CTRLConfig(
        n_embd=64, n_layer=2, n_head=4, dff=96, vocab_size=320, num_labels=1, pad_token_id=0
    ),
    "modernbert-decoder": lambda: transformers.ModernBertDecoderConfig(
        **SIZES, **TIED, intermediate_size=96, cls_token_id=0, sep_token_id=0
    ),
    "xlnet": lambda: transformers.XLNetConfig(
        d_model=64, n_layer=2, n_head=4, d_inner=96, vocab_size=320, num_labels=1
    ),
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=320, num_labels=1, pad_token_id=1,
        eos_token_id=0, decoder_start_token_id=1,
    ),
    "bart": lambda: transformers.BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=320, num_labels=1, pad_token_id=1, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    ),
    "t5gemma": lambda: transformers.T5GemmaConfig(
        **{side: transformers.T5GemmaModuleConfig(**T5GEMMA) for side in ("encoder", "decoder")},
        vocab_size=320,
        num_labels=1,
    ),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TEXTS = [("the quick", " brown fox"), ("pack my box", " with five"), ("sphinx", ""), ("a", " dog" * 12)]


def built(config, scale=4.0):
    torch.manual_seed(3)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


@pytest.fixture
def tokenizer(model_dirs):
    return transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])


def given(texts, messages=()):
    return Candidates([p for p, _ in texts], [[1]] * len(texts), {}, {}, lambda _: [c for _, c in texts], (), messages)


@torch.inference_mode()
def at_the_last(model, ids):
    """The head at the last token of one sequence, by hand."""
    model.eval()
    return model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).float()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pad", ["EOS", "none", "of its own", "beyond the embedding"])
@pytest.mark.parametrize("final_eos", [None, True, False])
@torch.inference_mode()
def test_a_decoder_is_read_at_its_last_token(tokenizer, name, pad, final_eos):
    """By length: where pad is EOS a text that ends with it would be read one token early."""
    model = built(DECODERS[name]())
    if pad == "none":
        tokenizer.pad_token = None
    elif pad == "beyond the embedding":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens([f"<more{i}>" for i in range(10)])
        tokenizer.pad_token = "<more9>"
        assert tokenizer.pad_token_id >= 320
    elif pad == "of its own":
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(5)
    model.config.pad_token_id = tokenizer.pad_token_id
    scorer = RewardModel(model, tokenizer, final_eos=final_eos)
    texts = [*TEXTS, ("ends with", "<eos>"), ("holds <eos>", " twice<eos><eos>")]
    found = scorer.score(given(texts))
    for (prompt, completion), score in zip(texts, found, strict=True):
        ids = tokenizer(prompt + completion).input_ids
        if final_eos is not None:
            while ids and ids[-1] == 0:
                ids.pop()
            ids += [0] * final_eos
        assert score.item() == pytest.approx(at_the_last(model, ids).item(), abs=1e-4)
        assert scorer.score(given([(prompt, completion)])).item() == pytest.approx(score.item(), abs=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_an_encoder_is_read_by_its_own_head_whatever_the_batch(tokenizer, name):
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    model = built(ENCODERS[name](), 2.0)
    scorer = RewardModel(model, tokenizer)
    model.eval()
    for (prompt, completion), score in zip(TEXTS, scorer.score(given(TEXTS)), strict=True):
        alone = model(torch.tensor([tokenizer(prompt + completion).input_ids])).logits[0, 0]
        assert score.item() == pytest.approx(alone.item(), abs=1e-4)


@pytest.mark.parametrize("name", OTHERS)
@torch.inference_mode()
def test_a_head_that_looks_for_its_token_itself_reads_texts_one_by_one(tokenizer, name):
    """Decoders whose head is not called `score`, one that reads the last column, encoder-decoders that count EOS."""
    model = built(OTHERS[name](), 3.0)
    given_pad = model.config.pad_token_id
    scorer = RewardModel(model, tokenizer, final_eos=True if name in ("t5", "bart") else None)
    assert model.config.pad_token_id == given_pad
    assert not scorer.reads_tokens
    texts = [*TEXTS, ("ends with", "<eos>"), ("holds <eos>", " twice<eos><eos>")]
    found = scorer.score(given(texts))
    assert model.config.pad_token_id == given_pad
    model.eval()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.pad_token_id = -1  # one row without padding: each of its tokens counts
    for (prompt, completion), score in zip(texts, found, strict=True):
        ids, _ = scorer.read(prompt, completion)
        row = torch.tensor([ids])
        want = model(row, attention_mask=torch.ones_like(row)).logits[0, 0]
        assert score.item() == pytest.approx(want.item(), abs=1e-5)
    assert found.std() > 1e-2


@torch.inference_mode()
def test_an_encoder_is_read_in_batches(tokenizer):
    assert all(RewardModel(built(make(), 2.0), tokenizer)._pads for make in ENCODERS.values())


def test_text_that_the_model_cannot_read_is_named(tokenizer):
    tokenizer.add_tokens([f"<more{i}>" for i in range(30)])
    scorer = RewardModel(built(DECODERS["llama"]()), tokenizer, "judge")
    with pytest.raises(InputError, match=r"'judge' embeds 320 tokens, a candidate to prompt 'a' has token"):
        scorer.score(given([("b", "c"), ("a", "<more29>")]))
    with pytest.raises(InputError, match="'judge': a candidate to prompt '' has no tokens"):
        scorer.score(given([("a", "b"), ("", "")]))


class TestAdapters:
    @pytest.fixture
    def adapted(self, tokenizer, tmp_path):
        """(a directory with an adapter on a reward model in another, the wrapped model)."""
        built(DECODERS["llama"]()).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False)
        wrapped = peft.get_peft_model(model, lora)
        with torch.no_grad():
            wrapped.get_base_model().score.modules_to_save["default"].weight.mul_(3)
        wrapped.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", wrapped

    @torch.inference_mode()
    def test_in_a_directory_and_wrapped(self, tokenizer, adapted):
        directory, wrapped = adapted
        wrapped.eval()
        want = wrapped(torch.tensor([tokenizer("the quick brown").input_ids])).logits.item()
        for scorer in (load_scorer(directory), RewardModel(wrapped, tokenizer)):
            assert scorer.score(given([("the quick", " brown")])).item() == pytest.approx(want, abs=1e-5)

    def test_without_its_tokenizer(self, adapted):
        directory, _ = adapted
        for file in directory.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(InputError, match=r"an adapter on .*base, without tokenizer files: copy the base's beside"):
            load_scorer(directory)

    def test_of_other_sizes(self, tokenizer, adapted):
        directory, _ = adapted
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory.parent / "base")
        model.resize_token_embeddings(340)
        peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(
            directory, save_embedding_layers=True
        )
        with pytest.raises(InputError, match=r"of other sizes than it .*: resize the base and merge it with peft"):
            load_scorer(directory)


def test_weights_of_another_kind(tokenizer, tmp_path):
    built(DECODERS["llama"]()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"its weights are pickles.*: save it as safetensors with transformers first"):
        load_scorer(tmp_path)
    with pytest.raises(InputError, match=r"no such directory \(that is a file\)"):
        RewardModel.from_pretrained(tmp_path / "pytorch_model.bin")


class TestForms:
    @torch.inference_mode()
    def test_chat(self, tokenizer):
        model = built(DECODERS["llama"]())
        assert RewardModel(model, tokenizer).form == "text"
        tokenizer.chat_template = TEMPLATE
        scorer = RewardModel(model, tokenizer)
        assert scorer.form == "chat"
        assert not scorer.reads_tokens
        asked = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the quick"}]
        candidates = given(
            [("the quick", "brown"), ("rendered", "fox"), (PromptKey(asked), "fox")], [None, asked, None]
        )
        texts = [
            "<user>the quick<eos><assistant>brown<eos>",
            *["<system>be kind<eos><user>the quick<eos><assistant>fox<eos>"] * 2,
        ]
        for text, score in zip(texts, scorer.score(candidates), strict=True):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert score.item() == pytest.approx(at_the_last(model, ids).item(), abs=1e-4)
        with pytest.raises(InputError, match=r"reads text, a prompt is .*form=\"chat\""):
            RewardModel(model, tokenizer, form="text").score(candidates)

    @torch.inference_mode()
    def test_pair(self, tokenizer):
        model = built(ENCODERS["bert"](), 2.0)
        scorer = RewardModel(model, tokenizer, form="pair")
        model.eval()
        for (prompt, completion), score in zip(TEXTS, scorer.score(given(TEXTS)), strict=True):
            alone = model(**tokenizer(prompt, completion, return_tensors="pt")).logits[0, 0]
            assert score.item() == pytest.approx(alone.item(), abs=1e-4)

    def test_the_checkpoint_says_it(self, tokenizer, tmp_path):
        model = built(DECODERS["llama"]())
        model.config.pyengine_reward = {"form": "text", "final_eos": True}
        tokenizer.chat_template = TEMPLATE
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        scorer = load_scorer(tmp_path)
        assert (scorer.form, scorer.final_eos) == ("text", True)
        assert RewardModel.from_pretrained(tmp_path, form="chat", final_eos=False).form == "chat"
        assert scorer.model.dtype == torch.float32
        assert RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16

    def test_what_is_no_form(self, tokenizer):
        model = built(DECODERS["llama"]())
        with pytest.raises(InputError, match="form must be one of text, chat, pair, got 'xml'"):
            RewardModel(model, tokenizer, form="xml")
        tokenizer.eos_token = None
        with pytest.raises(InputError, match="has no EOS token"):
            RewardModel(model, tokenizer, final_eos=True)

    @pytest.mark.parametrize("final_eos", [None, True])
    def test_an_engine_reads_the_same_by_its_cache_or_as_text(self, tokenizer, model_dirs, final_eos):
        engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
        scorer = RewardModel(built(DECODERS["llama"]()), tokenizer, final_eos=final_eos)
        engine.set_scorer(scorer)
        assert bool(engine._readers) == (final_eos is None)
        for result in engine.generate(["the quick", "sphinx"], Blockwise(3, 4), SamplingParams(max_tokens=12, seed=1)):
            if final_eos:
                whole = scorer.score(given([(result.prompt, result.text)])).item()
            else:  # its own tokens, which the text need not give again
                whole = scorer._batch([(result.prompt_ids + [t for t in result.tokens if t], [])]).item()
            assert result.reward == pytest.approx(whole, abs=1e-3)


class TestLabels:
    @torch.inference_mode()
    def test_a_chosen_label(self, tokenizer):
        config = DECODERS["llama"]()
        config.num_labels, config.id2label = 3, {0: "bad", 1: "so-so", 2: "good"}
        model = built(config)
        with pytest.raises(InputError, match=r"classifier with 3 labels \(bad, so-so, good\): give the one"):
            RewardModel(model, tokenizer)
        with pytest.raises(InputError, match="it has no 'fine'"):
            RewardModel(model, tokenizer, label="fine")
        ids = tokenizer("the quick brown").input_ids
        want = at_the_last(model, ids).log_softmax(-1)
        for label, at in (("good", 2), (0, 0)):
            scorer = RewardModel(model, tokenizer, label=label)
            assert scorer.score(given([("the quick", " brown")])).item() == pytest.approx(want[at].item(), abs=1e-4)
            assert reader_of(scorer, tokenizer, 8, 8e6) is not None

    def test_the_label_of_one_output_is_that_output(self, tokenizer):
        """And not its log-probability among one, which is 0."""
        model = built(DECODERS["llama"]())
        scores = [RewardModel(model, tokenizer, label=label).score(given(TEXTS)) for label in (None, "LABEL_0", 0)]
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2])
        with pytest.raises(InputError, match="it has no 'good'"):
            RewardModel(model, tokenizer, label="good")

    def test_a_head_for_every_step_is_refused(self, tokenizer, tmp_path):
        built(DECODERS["llama"]()).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        for name in ("LlamaForTokenClassification", "Qwen2ForProcessRewardModel"):
            config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [name]}
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(InputError, match=f"a {name} scores every step or token"):
                load_scorer(tmp_path)


def test_a_drawn_token_that_the_reward_model_does_not_embed(model_dirs, tokenizer):
    """The base pads its vocabulary to 320, the reward model embeds the tokenizer's only."""
    config = DECODERS["llama"]()
    config.vocab_size = len(tokenizer)
    engine = Engine.from_pretrained(model_dirs["llama"], cache_gb=0.01)
    engine.set_scorer(RewardModel(built(config), tokenizer))
    assert engine._readers
    with torch.no_grad():
        engine.model.lm_head.weight[318] = 3 * engine.model.lm_head.weight[5]
    results = engine.generate(
        ["the quick"] * 3, Blockwise(3, 4), [SamplingParams(max_tokens=12, seed=i) for i in range(3)]
    )
    assert any(max(c.tokens) >= len(tokenizer) for r in results for b in r.blocks for c in b.candidates)
    alone = engine.generate(["the quick"] * 9, None, [SamplingParams(max_tokens=12, seed=i) for i in range(9)])
    assert any(max(r.tokens) >= len(tokenizer) and r.reward is not None for r in alone)


class TestFunctions:
    def call(self, function, **options):
        candidates = Candidates(["a", "b"], [[5, 6], [7]], {}, {}, lambda _: ["x", "y"])
        return FunctionScorer(function, "f", **options).score(candidates).tolist()

    def test_by_trls_names(self):
        seen = {}

        def reward(completion_ids, **kwargs):
            seen.update(kwargs, completion_ids=completion_ids)
            return [1.0, 2.0]

        assert self.call(reward) == [1.0, 2.0]
        assert seen == {"prompts": ["a", "b"], "completions": ["x", "y"], "completion_ids": [[5, 6], [7]]}
        assert self.call(lambda completions: [len(c) for c in completions]) == [1.0, 1.0]
        assert self.call(
            lambda completions, prompts: [p + c == "ax" for p, c in zip(prompts, completions, strict=True)]
        ) == [1, 0]
        assert self.call(lambda completion_ids: [sum(t) for t in completion_ids]) == [11.0, 7.0]
        assert self.call(lambda **all: [len(all)] * 2) == [3.0, 3.0]
        assert self.call(lambda x, y: [len(x), len(y)]) == [2.0, 2.0]

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda p, c: 1 / 0, "scorer 'f' raised ZeroDivisionError: division by zero"),
            (lambda p, c: None, "must return one number for each of 2 completions, got None"),
            (lambda p, c: ["good", "bad"], "must return one number for each of 2 completions, got"),
            (lambda p, c: [1.0], r"must return one number for each of 2 completions, got shape \[1\]"),
            (lambda p, c: [10**400, 1], "must return one number for each of 2 completions, got"),
            (lambda p, c: [[1.0], [2.0]], r"got shape \[2, 1\]"),
            (lambda p, c: {"a": 1.0, "b": 2.0}, "must return one number"),
        ],
    )
    def test_what_is_no_reward(self, function, message):
        with pytest.raises(InputError, match=message) as caught:
            self.call(function)
        assert "\n" not in str(caught.value)

    def test_a_coroutine_is_no_reward(self):
        async def reward(prompts, completions):
            return [1.0, 2.0]

        with pytest.raises(InputError, match="must return one number for each of 2 completions, got <coroutine"):
            self.call(reward)


class TestScorerDirectories:
    @pytest.mark.parametrize(
        "config",
        [
            "[]",
            "null",
            "3",
            "[" * 100_000,
            '{"pyengine_scorer": ["prefix"]}',
            '{"pyengine_scorer": "probe", "hidden_size": "64"}',
            '{"pyengine_scorer": "probe", "hidden_size": -1}',
            '{"pyengine_scorer": "probe", "hidden_size": 64, "layer": "last"}',
            '{"pyengine_scorer": "probe", "hidden_size": 64, "layer": 1.5}',
            '{"pyengine_scorer": "probe", "hidden_size": 64, "name": 3}',
            '{"pyengine_scorer": "probe", "hidden_size": 64, "hidden": 8}',
            '{"pyengine_scorer": "probe", "hidden_size": 64, "colour": "red"}',
            '{"pyengine_scorer": "probe", "hidden_size": 9999999999999}',
            '{"pyengine_scorer": "prefix", "hidden_size": 64, "vocab_size": 99999999999, "width": 4}',
        ],
    )
    def test_a_config_that_is_none(self, tmp_path, config):
        from pyengine import Probe

        Probe(64).save(tmp_path)
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(InputError, match="scorer ") as caught:
            load_scorer(tmp_path)
        assert "\n" not in str(caught.value)

    def test_weights_of_another_shape_or_type(self, tmp_path):
        from safetensors.torch import save_file

        from pyengine import Probe

        probe = Probe(64)
        probe.save(tmp_path)
        state = {k: v.detach().bfloat16() for k, v in probe.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        assert load_scorer(tmp_path).head.weight.dtype == torch.float32
        save_file({k: v[..., :3].contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="size mismatch"):
            load_scorer(tmp_path)
