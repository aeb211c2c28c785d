"""What a request adds to a row of a host's logits: the law, budgets, sums, prefix models with little room, fields."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pyengine
from pyengine import InputError, PrefixModel, PrefixScorer, SamplingParams
from pyengine.decode.panel import policy_of
from pyengine.integrations.tilting import HostScorers, asked_for
from pyengine.vocabulary import FieldError


@pytest.fixture(scope="module")
def base():
    directory = pyengine.embedded("policy")
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def head():
    return pyengine.load_scorer(pyengine.embedded("prefix"))


@pytest.fixture
def host(base, head):
    """Two scorers that say the same: one reads the host's states, the other is a model with room for few rows."""
    model, tokenizer = base
    own = PrefixModel(AutoModel.from_pretrained(pyengine.embedded("policy")).eval(), tokenizer, head)
    found = HostScorers({"head": head, "model": own}, policy_of(model, tokenizer), cache_gb=1e-3)
    assert next(iter(found._places.values())).reader.cache.capacity < 14
    return found


@torch.inference_mode()
def passed(model, rows):
    """(logits, hidden states) [N, …] at each row's last token."""
    outputs = [model(torch.tensor([row]), output_hidden_states=True) for row in rows]
    return torch.cat([o.logits[:, -1] for o in outputs]), torch.cat([o.hidden_states[-1][:, -1] for o in outputs])


@torch.inference_mode()
def valued(head, hidden):
    return head.values({-1: hidden})


def asking(host, temperature=1.0, **fields):
    return host.tilting(asked_for(fields), SamplingParams(temperature=temperature))


@pytest.mark.parametrize("named", ["head", "model", "head=.25,model=.75"])
def test_rows_get_what_their_requests_ask_for_and_others_keep_their_bits(base, head, host, named):
    """Rows grow, come and go, and outgrow the model's cache."""
    model, _ = base
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 700, (n,), generator=draw).tolist() for n in (60, 90, 250, 300)]
    for step in range(20):
        rows = [[*row, 1 + (7 * step + i) % 700] for i, row in enumerate(rows)]
        if step == 9:
            rows[2] = rows[1][:45]  # the host has taken tokens back, and gives others
        here = [0, 1, 2, 3] if step % 3 else [3, 1]
        some = [rows[i] for i in here]
        logits, hidden = passed(model, some)
        own = {
            0: asking(host, 0.7, tilt_weight=3.0, tilt_scorer=named),
            1: None,
            2: asking(host, 1.6, tilt_kl_budget=0.3, tilt_scorer=named),
            3: asking(host, 0.0, tilt_weight=-8.0, tilt_scorer="head"),
        }
        found = logits.clone()
        count = host.add(found, hidden, [own[i] for i in here], lambda j: (here[j], some[j]))
        assert count == sum(own[i] is not None for i in here)
        values = valued(head, hidden)
        for j, i in enumerate(here):
            if i == 1:
                assert torch.equal(found[j], logits[j])
            elif i == 2:
                policy, before = (torch.log_softmax(x[j] / 1.6, -1) for x in (found, logits))
                assert abs((policy.exp() * (policy - before)).sum() - 0.3) < 0.004
                added = found[j] - logits[j]
                factor = added @ values[j] / (values[j] @ values[j])
                assert (added - factor * values[j]).abs().max() < 1e-4 * factor
            else:
                factor = 3.0 * 0.7 if i == 0 else -8.0
                assert (found[j] - logits[j] - factor * values[j]).abs().max() < 1e-4
    for places in host._places.values():
        for whose in list(places.stems):
            places.forget(whose)
        assert places.reader.cache.pages_free == places.reader.cache.capacity


def test_who_asked_longest_ago_gives_way(base, head, host):
    """Two long rows fill the cache; a third takes the place of the first, which is read anew when it asks again."""
    model, _ = base
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 700, (300,), generator=draw).tolist() for _ in range(3)]
    (places,) = host._places.values()
    own = asking(host, tilt_weight=2.0, tilt_scorer="model")
    for whose, there in ((0, {0}), (1, {0, 1}), (2, {1, 2}), (0, {2, 0})):
        logits, hidden = passed(model, [rows[whose]])
        found = logits.clone()
        host.add(found, hidden, [own], lambda _: (whose, rows[whose]))
        assert set(places.stems) == there
        assert (found - logits - 2 * valued(head, hidden)).abs().max() < 1e-4
    host.forget(2)
    assert set(places.stems) == {0}
    host.forget(0)
    pair = [torch.randint(1, 700, (325,), generator=draw).tolist() for _ in range(2)]
    for length in range(316, 325):  # at 321 tokens both need a sixth page, of eleven
        some = [row[:length] for row in pair]
        logits, hidden = passed(model, some)
        found = logits.clone()
        host.add(found, hidden, [own, own], lambda i: (i, some[i]))
        assert len(places.stems) == (2 if length <= 320 else 1)
        assert (found - logits - 2 * valued(head, hidden)).abs().max() < 1e-4


@pytest.mark.parametrize("weight", ["1e-50", "1e-44", "1e30"])
def test_a_budget_is_spent_whatever_the_size_of_the_weights(base, host, weight):
    model, _ = base
    logits, hidden = passed(model, [[5, 6, 7]])
    found = logits.clone()
    host.add(found, hidden, [asking(host, tilt_kl_budget=0.2, tilt_scorer=f"head={weight}")])
    policy, before = torch.log_softmax(found[0], -1), torch.log_softmax(logits[0], -1)
    assert abs((policy.exp() * (policy - before)).sum() - 0.2) < 0.003


def test_low_precision_logits_are_added_to(base, head, host):
    model, _ = base
    logits, hidden = passed(model, [[5, 6, 7]])
    half = logits.bfloat16()
    host.add(half, hidden, [asking(host, tilt_weight=2.0)])
    assert (half.float() - logits - 2 * valued(head, hidden)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tilt_wieght": 1}, "tilt_wieght"),
        ({"tilt_weight": "2"}, "tilt_weight"),
        ({"tilt_weight": float("nan")}, "tilt_weight"),
        ({"tilt_weight": 3e38}, "tilt_weight"),
        ({"tilt_weight": 1, "tilt_kl_budget": 1}, "tilt_kl_budget"),
        ({"tilt_strategy": "blockwise", "tilt_k": 4}, "tilt_strategy"),
        ({"tilt_scorer": "head"}, "tilt_scorer"),
        ({"tilt_weight": 1, "tilt_scorer": "other"}, "tilt_scorer"),
        ({"tilt_weight": 1, "tilt_candidates": True}, "tilt_candidates"),
        ({"tilt_weight": 10**400}, "tilt_weight"),
        ({"tilt_kl_budget": 0.1, "tilt_scorer": "head=0"}, "tilt_scorer"),
        ({"tilt_kl_budget": 0.1, "tilt_scorer": {"head": 10**400}}, "tilt_scorer"),
        ({"tilt_kl_budget": 0.1, "top_p": 0.5}, "tilt_kl_budget"),
        ({"tilt_kl_budget": 0.1, "temperature": 0.0}, "tilt_kl_budget"),
    ],
)
def test_what_a_request_gets_wrong_is_named(host, fields, field):
    sampling = {name: fields.pop(name) for name in ("top_p", "temperature") if name in fields}
    with pytest.raises(FieldError) as error:
        host.tilting(asked_for(fields), SamplingParams(**sampling))
    assert error.value.field == field
    assert field in str(error.value)


def test_no_field_and_no_weight_add_nothing(host):
    assert asked_for({"other": 1, 5: 2, "tilt_weight": None}) is None
    assert asking(host, tilt_weight=0.0) is None
    assert asking(host, tilt_weight=1.0, tilt_scorer="head=0") is None


def test_scorers_that_a_host_cannot_serve(base):
    model, tokenizer = base
    policy = policy_of(model, tokenizer)
    with pytest.raises(InputError, match="at least one"):
        HostScorers({}, policy)
    broken = PrefixScorer(policy.hidden_size, policy.vocab_size)
    broken.head.bias.data[7] = torch.nan
    for scorer, said in (
        (broken, "NaN or infinite"),
        (PrefixScorer(policy.hidden_size, policy.vocab_size, layer=0), "layer 0 of 3"),
        (PrefixScorer(policy.hidden_size + 1, policy.vocab_size), "trained for another model"),
        (PrefixScorer(policy.hidden_size, policy.vocab_size + 1), "same tokenizer"),
        (pyengine.embedded("probe"), "scores whole prefixes"),
        (pyengine.embedded("reward-model"), "scores whole prefixes"),
    ):
        with pytest.raises(InputError, match=said):
            HostScorers({"a": scorer}, policy)
