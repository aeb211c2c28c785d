"""Any sequence-classification checkpoint as a scorer of text, with its own tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pyengine.checkpoint import context_of, load_checkpoint
from pyengine.codec import Codec, PromptKey
from pyengine.errors import InputError
from pyengine.modes import evaluating
from pyengine.scorers.base import Candidates, Scorer

BATCH = 32  # texts in one forward pass
FORM = "pyengine_reward"  # of config.json: what the model was trained to read, {"form", "final_eos"}
Form = Literal["text", "chat", "pair"]


class RewardModel(Scorer):
    """The scalar logit of a prompt and its completion, read as text, so that any tokenizer will do.

    form: how the model was trained to read them: "text", the one behind the other; "chat", as messages of the user and
    the assistant, by the tokenizer's template; "pair", as two segments. None is what the checkpoint's config.json says
    (`pyengine train reward-model` writes it there), else "chat" if its tokenizer has a template, else "text".
    final_eos: whether an EOS ends what it reads; None is what the checkpoint says, else what the form gives.
    label: of a classifier with several labels, the one whose log-probability is the score, by name or number.

    The score is the head's at the last token, found by length: a text may hold the padding token or end with it. A
    head that cannot be told that length (a head of its own that looks for padding, an encoder-decoder) gets its texts
    one by one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "reward-model",
        form: Form | None = None,
        final_eos: bool | None = None,
        label: str | int | None = None,
    ) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper; the adapter stays
            model = model.get_base_model()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        says = getattr(model.config, FORM, None) or {}
        usual = "chat" if getattr(tokenizer, "chat_template", None) else "text"
        self.form = str(form or says.get("form") or usual)
        if self.form not in get_args(Form):
            raise InputError(
                f"reward model {name!r}: form must be one of {', '.join(get_args(Form))}, got {self.form!r}"
            )
        self.final_eos = says.get("final_eos") if final_eos is None else final_eos
        if self.final_eos and tokenizer.eos_token_id is None:
            raise InputError(f"reward model {name!r}: final_eos, but its tokenizer has no EOS token")
        self.label = self._label(label)
        self.codec = Codec(tokenizer, "the reward model", model.get_input_embeddings().weight.shape[0])
        longest = context_of(model.config) or math.inf
        self.longest = longest if longest > 0 else math.inf  # XLNet says -1
        for part, module in model.named_modules():  # RoBERTa counts positions from its padding index + 1
            if part.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                self.longest -= module.padding_idx + 1
        # A linear head on a decoder, as nearly all have it; what any other head reads is found out.
        whole = model.config.is_encoder_decoder
        self._head = None if whole else getattr(model, "score", None)
        self._pads = self._head is not None or (not whole and self._survives_padding())

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        trust_remote_code: bool = False,
        form: Form | None = None,
        final_eos: bool | None = None,
        label: str | int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RewardModel:
        """Load from a directory or hub id; safetensors only.

        dtype: in bf16 a score moves by up to .03 with the texts that are read beside it; in fp32 by 1e-5.
        """
        _refuse_other_heads(Path(path))
        model, tokenizer = load_checkpoint(
            AutoModelForSequenceClassification, "reward model", path, trust_remote_code, dtype=dtype
        )
        return cls(model, tokenizer, Path(path).name, form, final_eos, label)

    def move(self, device: torch.device) -> None:
        self.model.to(device)

    @property
    def reads_tokens(self) -> bool:
        """Whether it can read the base policy's tokens one after the other, as plain text without an EOS of its own."""
        return self.form == "text" and not self.final_eos and self._head is not None

    def value(self, logits: Tensor) -> Tensor:
        """The score, fp32 [N], of a head's output [N, labels]."""
        logits = logits.float()
        return logits[:, 0] if self.label is None else logits.log_softmax(-1)[:, self.label]

    def score(self, candidates: Candidates) -> Tensor:
        ids = [
            self.read(prompt, completion, messages)
            for prompt, completion, messages in zip(
                candidates.prompts, candidates.completions, candidates.conversations, strict=True
            )
        ]
        return self._all(candidates.prompts, ids)

    def score_tokens(self, prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> Tensor:
        """Scores, fp32 [N], of whole sequences of its tokens; InputError, naming the prompt, for one that is too long.

        A row that pads another model's vocabulary stands for its own last one.
        """
        most = self.codec.rows - 1
        return self._all(prompts, [([min(token, most) for token in tokens], []) for tokens in ids])

    def _all(self, prompts: Sequence[str], ids: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        for prompt, (tokens, _) in zip(prompts, ids, strict=True):
            self._refuse(prompt, tokens)
        return torch.cat([self._batch(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)])

    def read(self, prompt: str, completion: str, messages: Sequence[Any] | None = None) -> tuple[list[int], list[int]]:
        """(token ids, segment ids if the form has any) of a completion as the model reads it.

        messages: what the prompt was, if a conversation.
        """
        label = f"reward model {self.name!r}"
        conversation = messages or (prompt.form if isinstance(prompt, PromptKey) else None)
        segments: list[int] = []
        if self.form == "chat":
            asked = conversation or [{"role": "user", "content": prompt}]
            ids = self.codec.converse([*asked, {"role": "assistant", "content": completion}], label, ended=True)
        elif isinstance(prompt, PromptKey):
            raise InputError(f'{label} reads {self.form}, a prompt is {prompt!r:.40}: give texts, or form="chat"')
        elif self.form == "pair":
            found = self.tokenizer(prompt, completion, verbose=False)
            ids, segments = list(found.input_ids), list(found.get("token_type_ids") or [])
        else:
            ids = self.codec.encode(prompt + completion, label)
        eos = self.tokenizer.eos_token_id
        if self.final_eos is not None:
            while ids and ids[-1] == eos:
                ids.pop()
            ids += [eos] * self.final_eos
        return ids, segments

    def _refuse(self, prompt: str, tokens: Sequence[int]) -> None:
        """InputError for what the model cannot read."""
        name, rows = f"reward model {self.name!r}", self.codec.rows
        if not tokens:
            raise InputError(f"{name}: a candidate to prompt {prompt[:40]!r} has no tokens")
        if max(tokens) >= rows:
            raise InputError(
                f"{name} embeds {rows} tokens, a candidate to prompt {prompt[:40]!r} has token {max(tokens)}: "
                "its tokenizer is another's, or its embedding was not resized"
            )
        if len(tokens) > self.longest:
            raise InputError(
                f"{name} reads {self.longest} tokens, a candidate has {len(tokens)}: "
                f"{prompt[:40]!r}...; shorten max_tokens or take another reward model"
            )

    def _batch(self, ids: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Scores [N] of so many token sequences in one pass, padded on the right."""
        device = self.model.device
        lengths = torch.tensor([len(tokens) for tokens, _ in ids])
        pad = self.tokenizer.pad_token_id
        pad = 0 if pad is None or pad >= self.codec.rows else pad
        padded = torch.full((len(ids), int(lengths.max())), pad)
        segments = torch.zeros_like(padded)
        for row, (tokens, own) in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            segments[row, : len(own)] = torch.tensor(own, dtype=torch.long)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        given = {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
        if any(own for _, own in ids):
            given["token_type_ids"] = segments.to(device)
        with evaluating(self.model):
            if self._head is not None:
                # transformers would look for the last token that is no padding, by its id.
                hidden = self.model.base_model(**given, use_cache=False).last_hidden_state
                return self.value(self._head(hidden[torch.arange(len(ids)), (lengths - 1).to(device)]))
            if self._pads:
                return self.value(self.model(**given).logits)
            rows = [{key: x[row : row + 1, :n] for key, x in given.items()} for row, n in enumerate(lengths.tolist())]
            with self._padding(-1):
                return self.value(torch.cat([self.model(**row).logits for row in rows]))

    @contextmanager
    def _padding(self, token: int) -> Iterator[None]:
        """The model takes this id for padding inside, and no token for it where that is -1."""
        own = self.model.config
        configs = {id(config): config for config in (own, own.get_text_config(decoder=True))}.values()
        before = [config.pad_token_id for config in configs]
        try:
            for config in configs:
                config.pad_token_id = token
            yield
        finally:
            for config, pad in zip(configs, before, strict=True):
                config.pad_token_id = pad

    @torch.inference_mode()
    def _survives_padding(self) -> bool:
        """Whether a row that is padded with the id of its last token is read as it is alone.

        Not where the head looks for padding by its id, or takes the last column (XLNet).
        """
        rows = self.codec.rows
        ids = torch.tensor([[3 % rows, 10 % rows, 17 % rows, 17 % rows]], device=self.model.device)
        mask = torch.tensor([[1, 1, 1, 0]], device=ids.device)
        try:
            with evaluating(self.model):
                with self._padding(-1):
                    alone = self.model(input_ids=ids[:, :3], attention_mask=mask[:, :3]).logits
                with self._padding(int(ids[0, 3])):
                    padded = self.model(input_ids=ids, attention_mask=mask).logits
        except Exception:  # noqa: BLE001 - whatever it raises, its texts can be read one by one
            return False
        return torch.allclose(alone, padded, atol=1e-5, rtol=1e-4)

    def _label(self, label: str | int | None) -> int | None:
        names = {int(i): str(name) for i, name in (self.model.config.id2label or {}).items()}
        count = self.model.config.num_labels
        known = {name: i for i, name in names.items()} | {i: i for i in range(count)}
        if count == 1 and (label is None or label in known):  # of one label the log-probability is 0
            return None
        if label not in known:
            shown = ", ".join(names.get(i, str(i)) for i in range(min(count, 8)))
            has = "" if label is None else f"; it has no {label!r}"
            raise InputError(
                f"reward model {self.name!r} is a classifier with {count} labels ({shown}): give the one whose "
                f"log-probability is the score (label=), or take a model with one output{has}"
            )
        return known[label]


def _refuse_other_heads(path: Path) -> None:
    """InputError for a checkpoint that scores tokens or steps and not whole responses."""
    try:
        names = json.loads((path / "config.json").read_bytes()).get("architectures") or []
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    other = [str(name) for name in names if "TokenClassification" in str(name) or "ProcessReward" in str(name)]
    if other:
        raise InputError(
            f"reward model {path}: a {other[0]} scores every step or token; a scorer needs one number for a response, "
            "from a sequence classifier"
        )
