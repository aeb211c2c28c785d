"""Every decoder against a recompute, what leaves no trace, and the choice between them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

import pyengine.attention as attention_module
import pyengine.group as group_module
import pyengine.ops.linear as linear_module
from pyengine import Engine, InputError, SamplingParams
from pyengine.attention import Loan, layer_shapes
from pyengine.cache import PAGE, budget_for, token_bytes
from pyengine.checkpoint import context_of
from pyengine.decoder import BranchingDecoder, Frontier
from pyengine.fallback import TESTED, RecomputeDecoder, ReplicatedDecoder, choose_decoder
from pyengine.group import Group

BUDGET = 8e6  # bytes
LAYERS = (1, -1)
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def prompts(*lengths, vocab=300):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def poison(decoder):
    """NaN wherever nobody has written: what is read from there shows."""
    for pair in (*decoder.cache._pages, *decoder.cache._tails):
        for store in pair:
            store.fill_(float("nan"))


@torch.inference_mode()
def walk(decoder, starting=(11, 3, 6), joining=()):
    """Blocks with ragged commits, prompts that leave, others that join; every frontier on the way."""
    seen = []
    generator = torch.Generator().manual_seed(0)

    def block(steps):
        seen.append(group.fork())
        for _ in range(steps):
            seen.append(group.append(torch.randint(1, 300, (len(seen[-1].logits),), generator=generator)))

    group = Group(decoder, 3, 8)
    try:
        group.join(prompts(*starting))
        block(6)
        group.commit(torch.tensor([2, 3, 7]))
        block(2)
        seen.append(group.keep(torch.tensor([0, 4, 5, 8])))
        seen.append(group.append(torch.tensor([5, 6, 7, 8])))
        group.commit(torch.tensor([2, 0]))  # one prompt leaves, the others change places
        if joining:
            group.join(prompts(*joining))
        block(5)
        group.commit(torch.tensor([4, 1]))
        block(8)
    finally:
        group.close()
    return seen


def assert_same(found, want, atol=1e-5):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=atol, rtol=0)
        for layer in a.hidden:
            torch.testing.assert_close(a.hidden[layer], b.hidden[layer], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", [BranchingDecoder, ReplicatedDecoder])
def test_every_branch_equals_a_recompute(model_dir, kind):
    """Sliding windows of 8 are crossed inside the prompt and inside blocks."""
    model = load(model_dir)
    decoder = kind(model, LAYERS, 64) if kind is ReplicatedDecoder else kind(model, LAYERS, 64, BUDGET)
    if kind is BranchingDecoder:
        poison(decoder)
    before = model.config._attn_implementation
    atol = 1e-5 if kind is BranchingDecoder else 2e-4  # left padding costs precision
    assert_same(walk(decoder), walk(RecomputeDecoder(model, LAYERS)), atol)
    assert model.config._attn_implementation == before


def test_trees_that_stay_where_they_are_give_the_same(model_dirs):
    """As on a GPU, padded to buckets."""
    model = load(model_dirs["mistral"])
    decoder = BranchingDecoder(model, LAYERS, 64, BUDGET)
    poison(decoder)
    decoder.waits = True
    assert_same(walk(decoder), walk(RecomputeDecoder(model, LAYERS)))


def test_all_tested_architectures_are_tested(model_dirs):
    types = {transformers.AutoConfig.from_pretrained(path).model_type for path in model_dirs.values()}
    assert types == TESTED


@torch.inference_mode()
def test_prompts_longer_than_a_page_join_while_others_decode(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, LAYERS, 64, BUDGET)
    poison(decoder)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    first, second = prompts(70), prompts(65)

    def two_blocks(each, before=(), after=()):
        group = Group(each, 3, 8)
        group.join(list(before))
        if before:
            group.fork()
            group.append(tokens[0][: 3 * len(before)])
            group.commit(torch.arange(len(before)) * 3 + 1)
        group.join(list(after))
        group.fork()
        return group

    found = two_blocks(decoder, first, second).append(tokens.flatten())
    want = two_blocks(RecomputeDecoder(model, LAYERS), first).append(tokens[0])
    assert_same([found.rows(torch.arange(3))], [want])
    want = two_blocks(RecomputeDecoder(model, LAYERS), (), second).append(tokens[1])
    assert_same([found.rows(torch.arange(3, 6))], [want])


@torch.inference_mode()
def test_a_shared_system_prompt_is_prefilled_once(model_dirs):
    model = load(model_dirs["llama"])
    decoder, seen = BranchingDecoder(model, (), 64, BUDGET, frozen=True), []
    forward = decoder._forward
    decoder._forward = lambda work, ids, *rest: seen.append(len(ids)) or forward(work, ids, *rest)
    system = prompts(PAGE + 5)[0]
    mine, yours = [*system, 5, 6, 7], [*system, 8, 9]
    group = Group(decoder, 2, 4)
    group.join([mine, yours])  # in one pass: yours reads what mine writes
    assert seen == [PAGE + 8 + 7]
    assert decoder.cache.pages_in_use == 3
    both = group.fork()
    group.close()
    group = Group(decoder, 1, 4)
    group.join([yours])
    assert seen[1:] == [7]
    torch.testing.assert_close(group.fork().logits, both.logits[2:3], atol=2e-5, rtol=1e-5)
    group.close()
    alone = Group(RecomputeDecoder(model, ()))
    alone.join([mine, yours])
    torch.testing.assert_close(alone.fork().logits, both.logits[::2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
@torch.inference_mode()
def test_a_long_prompt_is_read_in_several_passes(model_dirs, name, monkeypatch):
    """Its first page is shared, and windows begin in an earlier pass than they end in."""
    monkeypatch.setattr(group_module, "PREFILL_TOKENS", 50)
    monkeypatch.setattr(attention_module, "QUERIES", 16)  # whose masks are written out at once
    model = load(model_dirs[name])
    decoder, seen = BranchingDecoder(model, LAYERS, 64, BUDGET), []
    forward = decoder._forward
    decoder._forward = lambda work, ids, *rest: seen.append(len(ids)) or forward(work, ids, *rest)
    long = prompts(PAGE + 130)[0]
    group, alone = Group(decoder), Group(RecomputeDecoder(model, LAYERS))
    for each in (group, alone):
        each.join([long[: PAGE + 1], [*long, 3]])
    assert seen == [50, 50, 50, 46]
    assert_same([group.fork()], [alone.fork()])


@torch.inference_mode()
def test_pages_of_a_prompt_that_leaves_before_it_is_read_are_read_by_whoever_shares_them(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, (), 64, BUDGET)
    poison(decoder)
    long = prompts(4 * PAGE)[0]
    decoder.begin()
    gone, mine, yours = (decoder.join([*long, last], 1) for last in (3, 5, 7))
    assert mine.filled == yours.filled == 4 * PAGE
    assert decoder.prefill([gone, mine, yours], PAGE + 9) == []
    decoder.leave(gone)
    found = []
    while len(found) < 2:
        found += decoder.prefill([stem for stem in (mine, yours) if stem.filled < len(stem.ids)], 100)
    for stem, frontier in found:
        want = model(input_ids=torch.tensor([stem.ids]), use_cache=False).logits[:, -1]
        torch.testing.assert_close(frontier.logits, want, atol=2e-5, rtol=1e-5)
    for stem in (mine, yours):
        decoder.leave(stem)
    decoder.cache.check_integrity()
    assert decoder.cache.pages_in_use == 0


@torch.inference_mode()
def test_a_prompt_that_is_cached_whole_still_has_a_token_to_read(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, (), 64, BUDGET, frozen=True)
    found = []
    for _ in range(2):
        group = Group(decoder)
        group.join(prompts(PAGE))
        found.append(group.fork().logits)
        group.close()
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_permuting_prompts_and_branches_permutes_the_frontier(model_dirs):
    model = load(model_dirs["qwen2"])
    decoder = BranchingDecoder(model, LAYERS, 64, BUDGET)
    tokens = torch.arange(12).view(3, 4) + 7

    def run(order, branches):
        group = Group(decoder, 4, 4)
        group.join([prompts(5, 90, 33)[i] for i in order])
        group.fork()
        found = [group.append(tokens[order][:, branches].flatten())]
        group.commit(torch.tensor([branches.index(2) + 4 * i for i in range(3)]))
        found += [group.fork(), group.append(tokens[order][:, branches].flatten())]
        group.close()
        found = Frontier.of(found)
        return found.logits.view(3, 3, 4, -1)

    straight, turned = run([0, 1, 2], [0, 1, 2, 3]), run([2, 0, 1], [3, 1, 0, 2])
    torch.testing.assert_close(turned[0], straight[0, [2, 0, 1]][:, [3, 1, 0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[2], straight[2, [2, 0, 1]][:, [3, 1, 0, 2]], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_what_fails_while_joining_leaves_nothing_behind(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, (), 64, BUDGET)
    decoder.begin()
    stems = [decoder.join(ids, 1) for ids in prompts(70, 70)]

    def fall(*_):
        raise RuntimeError("no memory")

    forward, decoder._forward = decoder._forward, fall
    with pytest.raises(RuntimeError, match="no memory"):
        decoder.prefill(stems, 4096)
    decoder._forward = forward
    for stem in stems:
        decoder.leave(stem)
    assert decoder.cache.pages_in_use == 0
    assert not decoder.cache._named, "pages that were never filled may not be shared"
    decoder.cache.check_integrity()


def test_what_does_not_fit_is_said_or_waits(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, (), 64, 1.0e6)  # 2 * 2 * 16 * 4 * 3 = 768 bytes a token: 15 pages, 20 leaves
    assert decoder.cache.capacity == 15
    assert decoder.cache.leaves == 20
    said = decoder.refuses(5, 5, 100, 16)
    assert re.search(r"100 branches of 16 tokens need a cache of 0\.00492 GB .*cache_gb", said)
    assert decoder.refuses(5, 5, 20, 16) is None
    assert "200 tokens that may grow by 1000 needs 19 pages of cache, there are 15" in decoder.refuses(200, 1000, 1, 16)
    assert decoder.refuses(200, 760, 1, 16) is None
    assert decoder.refuses(200, 761, 1, 16) is not None
    stems = [decoder.join([i] * 200, 1) for i in range(5)]
    assert [stem is None for stem in stems] == [False] * 3 + [True] * 2
    decoder.leave(stems[1])
    assert decoder.join([9] * 200, 21) is None, "as many leaves as there are"
    assert decoder.join([9] * 200, 20) is not None
    with pytest.raises(InputError, match="too small"):
        BranchingDecoder(model, (), 64, 1000)


def test_ten_thousand_blocks_end_with_no_page_in_use(model_dirs, monkeypatch):
    """The books alone: the model is not run."""
    decoder = BranchingDecoder(load(model_dirs["llama"]), (), 64, BUDGET)
    zeros = torch.zeros

    def skip(work, ids, positions, rows=None):
        return Frontier(zeros(len(ids) if rows is None else len(rows), 1), {})

    monkeypatch.setattr(decoder, "_forward", skip)
    generator = torch.Generator().manual_seed(0)
    blocks = 0
    while blocks < 10_000:
        group = Group(decoder, 3, 4)
        group.join(prompts(*torch.randint(1, 200, (4,), generator=generator).tolist()))
        while group.stems:
            group.fork()
            for _ in range(3):
                group.append(zeros(3 * len(group.stems), dtype=torch.long))
            stay = [i for i in range(len(group.stems)) if torch.rand((), generator=generator) < 0.8]
            group.commit(torch.tensor([3 * i + 1 for i in stay], dtype=torch.long))
            blocks += 1
        decoder.cache.check_integrity()
        assert decoder.cache.leaves_free == decoder.cache.leaves
        group.close()
    assert decoder.cache.pages_in_use == 0
    decoder.cache.check_integrity()


@torch.inference_mode()
def test_new_weights_read_a_prompt_anew(model_dirs):
    model = load(model_dirs["llama"])
    decoder = BranchingDecoder(model, (), 64, BUDGET)

    def logits():
        group = Group(decoder)
        group.join(prompts(PAGE + 9))
        found = group.fork().logits
        group.close()
        decoder.cache.check_integrity()
        return found

    logits()
    with torch.inference_mode(False), torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    recompute = Group(RecomputeDecoder(model, ()))
    recompute.join(prompts(PAGE + 9))
    torch.testing.assert_close(logits(), recompute.fork().logits, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_autocast_may_have_another_mind_than_the_cache(model_dirs, monkeypatch):
    monkeypatch.setattr(linear_module, "quicker", lambda: False)
    model = load(model_dirs["llama"])
    with torch.autocast("cpu", torch.bfloat16):
        found = walk(BranchingDecoder(model, LAYERS, 64, BUDGET))
        want = walk(RecomputeDecoder(model, LAYERS))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.logits.float(), b.logits.float(), atol=0.2, rtol=0.05)


def test_a_window_that_is_told_to_the_mask_alone_is_refused():
    config = transformers.Qwen2MoeConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, use_sliding_window=True, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="told to the mask alone"):
        BranchingDecoder(tiny(config), (), 64, BUDGET)


def tiny(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rope(kind, **extra):
    sizes = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return tiny(transformers.LlamaConfig(**sizes, num_attention_heads=4, rope_parameters=parameters | extra))


def test_longrope_is_recomputed_so_that_a_prompt_does_not_feel_its_neighbours(model_dirs, caplog):
    model = rope("longrope", short_factor=[1.0] * 6, long_factor=[4.0] * 6)
    engine = Engine(model, transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]))
    assert "longrope" in caplog.text
    short, long, sampling = "77", "7" * 30, SamplingParams(max_tokens=8, seed=1)
    assert len(engine.encode(short)) + 8 < 16 < len(engine.encode(long))
    both = engine.generate([short, long], sampling=sampling)
    for prompt, result in zip((short, long), both, strict=True):
        assert result.logp_base == pytest.approx(engine.generate(prompt, sampling=sampling)[0].logp_base, abs=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "linear"])
def test_scaled_rope_equals_a_recompute_as_far_as_it_is_said_to_reach(kind, model_dirs):
    """dynamic: its frequencies stay as they are within max_position_embeddings."""
    model = rope(kind)
    model.config.max_position_embeddings = 40
    engine = Engine(model, transformers.AutoTokenizer.from_pretrained(model_dirs["llama"]))
    assert isinstance(engine._decoder, BranchingDecoder)
    assert engine.context == (40 if kind == "dynamic" else 64)  # 4 x 16, where that is more
    prompt = "7" * (engine.context - 6)
    (result,) = engine.generate(prompt, None, SamplingParams(max_tokens=20, seed=1))
    assert len(result.tokens) == 6 or result.finish_reason == "stop"
    ids = torch.tensor([engine.encode(prompt) + result.tokens])
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    first = ids.shape[1] - len(result.tokens)
    for i, (token, logp) in enumerate(zip(result.tokens, result.logp_base, strict=True)):
        assert logp == pytest.approx(whole[first + i - 1, token].item(), abs=1e-4)


def test_a_context_is_read_as_transformers_documents_it():
    def context(longest, **rope):
        config = transformers.LlamaConfig(max_position_embeddings=longest, rope_parameters={"rope_theta": 1e4, **rope})
        return context_of(config)

    assert context(100, rope_type="default") == 100
    assert context(100, rope_type="yarn", factor=4.0, original_max_position_embeddings=100) == 400
    assert context(400, rope_type="yarn", factor=4.0, original_max_position_embeddings=100) == 400
    assert context(100, rope_type="linear", factor=2.0) == 200
    assert context(100, rope_type="dynamic", factor=2.0) == 100
    assert context(400, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) == 400
    assert context_of(transformers.BloomConfig()) is None
    sides = transformers.Gemma3TextConfig(max_position_embeddings=512)  # a scale for each kind of layer
    sides.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    assert context_of(sides) == 512


def test_a_model_that_reads_both_ways_is_no_decoder():
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=4)
    with pytest.raises(InputError, match=r"bert: .* reads in both directions and is no decoder"):
        choose_decoder(tiny(config), (), 64, BUDGET)
    config.is_decoder = True
    choose_decoder(tiny(config), (), 64, BUDGET)


UNKNOWN = {
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, pad_token_id=0),
    "starcoder2": lambda: transformers.Starcoder2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=5
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, num_local_experts=2
    ),
    "cohere2": lambda: transformers.Cohere2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=5, pad_token_id=0
    ),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize(("max_rows", "tail_tokens"), [(1, 256), (2, 256), (3, 256), (64, 16), (64, 32), (64, 48)])
def test_a_trial_asks_nothing_of_the_engines_own_rows_and_memory(name, max_rows, tail_tokens):
    """One that forks more rows than there are tails writes behind them."""
    model = tiny(UNKNOWN[name]())
    each = token_bytes(layer_shapes(Loan(model)), torch.float32)
    decoder = choose_decoder(model, (), max_rows, budget_for(each, 1, tail_tokens))
    assert isinstance(decoder, BranchingDecoder)
    assert decoder.max_rows == max_rows
    assert 16 * decoder.cache.leaves in range(tail_tokens, 4 * tail_tokens)
    group = Group(decoder)
    group.join([[5, 6, 7, 8, 9, 10, 11]])
    found = [group.fork().logits, group.append(torch.tensor([12])).logits]
    group.close()
    whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), use_cache=False).logits[0, -2:]
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-5, rtol=0)


class Starting(torch.nn.Module):
    """A projection that knows the first token of what it is given: right only where a pass holds the whole text."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x[:, :1].mean()


def test_a_model_that_no_cache_serves_is_found_out(caplog):
    """Both guards: the branching cache goes wrong, and so does a copied one."""
    model = tiny(UNKNOWN["smollm3"]())
    attention = model.model.layers[1].self_attn
    attention.o_proj = Starting(attention.o_proj)
    assert isinstance(choose_decoder(model, (), 64, BUDGET), RecomputeDecoder)
    assert "prefixes are copied for each branch instead of shared (logits differ by" in caplog.text
    assert "its cache cannot be branched (logits differ by" in caplog.text


@pytest.mark.parametrize(
    ("window", "reason"), [(8, "cannot be branched (logits differ by"), (300, "its keep_window_size of 300 tokens")]
)
def test_a_window_that_nothing_is_told_of_is_passed_by_the_trial_or_leaves_no_cache(window, reason, caplog):
    """Doge masks what lies beyond its keep_window_size by content."""
    config = transformers.DogeConfig(
        **SMALL, intermediate_size=64, num_key_value_heads=2, keep_window_size=window, pad_token_id=0
    )
    assert isinstance(choose_decoder(tiny(config), (), 64, BUDGET), RecomputeDecoder)
    assert reason in caplog.text


def test_a_cache_that_is_not_there_is_an_error_and_never_the_slow_decoder(model_dirs, monkeypatch):
    model = tiny(UNKNOWN["smollm3"]())
    with pytest.raises(InputError, match=r"a cache of 1e\+06 GB \(cache_gb\): .* GB of memory are free"):
        choose_decoder(model, (), 64, 1e15)
    empty = torch.empty

    def full(*sizes, **options):
        if len(sizes) == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", full)
    for each in (model, load(model_dirs["llama"])):
        with pytest.raises(InputError, match=r"cannot be allocated \(DefaultCPUAllocator.*give a smaller cache_gb"):
            choose_decoder(each, (), 64, BUDGET)


def test_what_a_message_asks_for_is_enough(model_dirs):
    """The GB that a refusal names, given as they are printed."""
    model = load(model_dirs["llama"])

    def named(message):
        return 1e9 * float(re.search(r"(?:need a cache of|cache_gb;|take) ([\d.e+-]+) GB", message)[1])

    with pytest.raises(InputError) as caught:
        BranchingDecoder(model, (), 64, 1000)
    BranchingDecoder(model, (), 64, named(str(caught.value)))
    decoder = BranchingDecoder(model, (), 64, 1e6)
    said = decoder.refuses(5, 5, 100, 20)
    assert BranchingDecoder(model, (), 64, named(said)).refuses(5, 5, 100, 20) is None
    larger = BranchingDecoder(model, (), 64, named(decoder.refuses(3000, 77, 1, 16)))
    assert larger.refuses(3000, 77, 1, 16) is None


def test_unknown_architecture_that_branches_is_accepted():
    config = transformers.OlmoConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    assert isinstance(choose_decoder(tiny(config), (), 64, BUDGET), BranchingDecoder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BloomConfig(**SMALL), "AttentionInterface"),
        (transformers.FalconConfig(**SMALL), "AttentionInterface"),
        pytest.param(
            transformers.GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
            "AttentionInterface",
            marks=pytest.mark.skipif(
                hasattr(transformers.models.gptj.modeling_gptj, "ALL_ATTENTION_FUNCTIONS"),
                reason="it has the hook since transformers 5.24",
            ),
        ),
        (
            transformers.Llama4TextConfig(
                **SMALL,
                intermediate_size=64,
                intermediate_size_mlp=64,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=2,
                attention_chunk_size=16,
            ),
            "chunked",
        ),
    ],
    ids=["bloom", "falcon", "gptj", "llama4"],
)
def test_architectures_without_a_hook_copy_their_prefix(config, reason, caplog):
    decoder = choose_decoder(tiny(config), (), 64, BUDGET)
    assert isinstance(decoder, ReplicatedDecoder)
    assert reason in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8),
        transformers.OpenAIGPTConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=96),
    ],
    ids=["recurrent state", "no cache"],
)
def test_model_whose_cache_cannot_branch_is_recomputed(config, model_dirs, caplog):
    model = tiny(config)
    assert isinstance(choose_decoder(model, (), 64, BUDGET), RecomputeDecoder)
    assert "cannot be branched" in caplog.text
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dirs["llama"])
    result = Engine(model, tokenizer).generate("the quick")[0]
    assert result.tokens


@pytest.mark.filterwarnings("always::FutureWarning")
def test_no_decoder_uses_a_name_that_transformers_has_given_up(model_dirs, monkeypatch, recwarn):
    """transformers 5.24 calls `past_key_values` `cache`: it warns of an argument, and says it of an output's field."""
    said = []
    logger = transformers.utils.generic.logger
    monkeypatch.setattr(type(logger), "warning_once", lambda self, message, *_: said.append(message), raising=False)
    model = load(model_dirs["llama"])
    for decoder in (ReplicatedDecoder(model, LAYERS), RecomputeDecoder(model, LAYERS)):
        walk(decoder)
    walk(BranchingDecoder(model, LAYERS, 64, BUDGET))
    said += [str(warning.message) for warning in recwarn]
    assert not [message for message in said if "deprecated" in message]
