"""Every causal language model of transformers, tiny and random: what the engine draws, against a recompute.

    python -m bench.architectures [--only NAME,NAME]

Each model decodes three ragged prompts, one of them longer than a page, base and in blocks of three branches; the
log-probability of every drawn token is compared with one pass of the model itself over the whole sequence. Writes
bench/results/architectures.json: the decoder that serves each, the largest difference in nats, the standard
deviation of its log-probabilities (a model that
is nearly uniform would show nothing), or why it is not served.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pyengine import Blockwise, Engine, SamplingParams
from pyengine.errors import InputError, first_line

# Sizes under the names that configs give them; each takes those that it has.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 256,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 48,
    "d_ff": 48,
    "word_embed_proj_dim": 32,
    "sliding_window": 20,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
LENGTHS = (5, 70, 21)
MOST = 2e7  # parameters: more than that is no tiny model, whatever the sizes say
OUT = Path(__file__).parent / "results" / "architectures.json"


class Numbers:
    """A tokenizer whose words are numbers; prompts are given as token ids."""

    bos_token = bos_token_id = eos_token_id = chat_template = None
    all_special_ids: tuple[int, ...] = ()
    is_fast = False

    def __len__(self) -> int:
        return SIZES["vocab_size"]

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(len(self))}

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def small(kind: type) -> transformers.PreTrainedModel:
    """The architecture at its smallest, with weights that make logits differ clearly."""
    names = vars(kind())
    sizes = {name: value for name, value in SIZES.items() if name in names or name in ("is_decoder",)}
    types = names.get("layer_types")
    if types:
        sizes["layer_types"] = [types[0], types[-1]]
    config = kind(**sizes)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if numbers > MOST:
        raise ValueError(f"{numbers / 1e6:.0f} M parameters at these sizes")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def compare(model: transformers.PreTrainedModel) -> dict[str, object]:
    engine = Engine(model, Numbers(), cache_gb=0.02)
    engine.eos = frozenset()
    engine.set_scorer(lambda prompts, completions: [float(len(c)) for c in completions])
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in LENGTHS]
    sampling = [SamplingParams(max_tokens=24, seed=i) for i in range(len(prompts))]
    gap, spread = 0.0, 0.0
    for strategy in (None, Blockwise(3, 5)):
        for result in engine.generate(prompts, strategy, sampling):
            ids = torch.tensor([result.prompt_ids + result.tokens])
            logp = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            spread = max(spread, logp.std(-1).mean().item())
            first = ids.shape[1] - len(result.tokens)
            want = logp[first - 1 : -1].gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
            gap = max(gap, (want - torch.tensor(result.logp_base)).abs().max().item())
    return {"decoder": type(engine._decoder).__name__, "nats": gap, "spread": round(spread, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="architectures, by model_type, separated by commas")
    only = parser.parse_args().only
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = kind.model_type
        if (only and name not in only.split(",")) or name in found:
            continue
        try:
            model = small(kind)
        except Exception as error:  # noqa: BLE001 - sizes that an architecture does not take
            found[name] = {"not built": f"{type(error).__name__}: {first_line(error)}"[:160]}
        else:
            try:
                found[name] = compare(model)
            except InputError as error:
                found[name] = {"refused": str(error)}
            except Exception as error:  # noqa: BLE001
                found[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"[:160]}
        print(name, json.dumps(found[name]), flush=True)
    compared = {name: row for name, row in found.items() if "nats" in row}
    wrong = [name for name, row in compared.items() if not row["nats"] <= 1e-4]  # type: ignore[operator]
    print(f"{len(compared)} architectures compared, {len(wrong)} differ by more than 1e-4 nats: {wrong}")
    if not only:
        about = {"transformers": transformers.__version__, "torch": torch.__version__, "architectures": found}
        OUT.write_text(json.dumps(about, indent=1) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
