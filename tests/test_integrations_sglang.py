"""What pyengine does in SGLang's scheduler, without SGLang: `pytest tests/hosts` has the rest."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch

import pyengine
from pyengine import PrefixScorer, SamplingParams
from pyengine.errors import InputError
from pyengine.integrations.sglang import gigabytes_of, scorers_of
from pyengine.integrations.sglang.routes import CARRY, Lift, lifted
from pyengine.integrations.sglang.rows import Row, Rows, Step, admitted, check_reading
from pyengine.integrations.tilting import HostScorers, Tilting
from pyengine.scorers import Policy
from pyengine.vocabulary import FieldError

POLICY = Policy("model 'small'", vocab_size=30, hidden_size=8, layers=3, device=torch.device("cpu"))
READ = 5  # tokens of every prompt


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(1)
    return PrefixScorer(8, 30, width=4, name="one")


class Thing(SimpleNamespace):
    """Hashable, and with weak references."""

    __hash__ = object.__hash__


def request(output=()):
    return Thing(origin_input_ids=list(range(READ)), output_ids=list(output))


def pass_of(scorer, requests, lengths, bad=()):
    """(logits before, logits after, the rows): one pass over requests of which the even ones are tilted by 2, at 1.5.

    bad: the rows whose hidden states are NaN.
    """
    rows = Rows(HostScorers({"one": scorer}, POLICY), lambda: 8)
    torch.manual_seed(2)
    logits, hidden = torch.randn(len(requests), 30), torch.randn(len(requests), 8)
    hidden[list(bad)] = torch.nan
    given = [None if i % 2 else Row(Tilting({scorer: 2.0}, 0.0, 1.5), one) for i, one in enumerate(requests)]
    rows.keep(hidden)
    rows.step = Step(lengths, list)
    after = logits.clone()
    rows.tilt(after, given)
    return logits, hidden, after, rows, given


def test_tilted_rows_get_their_own_values_and_the_others_keep_their_bits(scorer):
    requests = [request() for _ in range(4)]
    before, hidden, after, rows, given = pass_of(scorer, requests, [READ] * 4)
    expected = before + 1.5 * 2.0 * scorer.values({-1: hidden})
    torch.testing.assert_close(after[::2], expected[::2])
    assert torch.equal(after[1::2], before[1::2])
    assert rows.tilted == 2
    requests[0].output_ids.append(9)
    assert rows.fault(given[0]) is None


def test_a_row_whose_token_is_thrown_away_is_left_alone(scorer):
    """Part of a prompt, and the prompt and response of a request that was preempted."""
    preempted = request([7, 8, 9])
    requests = [request(), request(), preempted, request(), request()]
    before, _, after, rows, given = pass_of(scorer, requests, [READ - 2, READ, READ + 1, READ, READ])
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4], before[4])
    assert (rows.tilted, given[2].drawn) == (1, {})


def test_a_token_that_nobody_tilted_is_found(scorer):
    requests = [request([7])]
    _, _, _, rows, given = pass_of(scorer, requests, [READ + 1])
    assert "past pyengine" in rows.fault(given[0])  # the first token; the pass was for the second
    requests[0].output_ids.append(8)
    assert rows.fault(given[0]) is None
    assert "past pyengine" in rows.fault(given[0])  # each is asked for once


def test_nan_is_its_row_s_own_fault(scorer):
    requests = [request() for _ in range(4)]
    _, _, after, rows, given = pass_of(scorer, requests, [READ] * 4, bad=[0])
    assert after.isfinite().all()
    for one in requests:
        one.output_ids.append(3)
    assert "finite" in rows.fault(given[0])
    assert rows.fault(given[2]) is None


def test_a_pass_that_nobody_saw_is_an_error(scorer):
    rows = Rows(HostScorers({"one": scorer}, POLICY), lambda: None)
    rows.keep(torch.zeros(2, 8))
    assert rows.hidden is None
    rows.step = Step([READ, READ], list)
    with pytest.raises(RuntimeError, match="saw nothing"):
        rows.tilt(torch.zeros(2, 30), [None, None])
    rows.capacity = lambda: 8
    rows.keep(torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="saw nothing"):
        rows.tilt(torch.zeros(3, 30), [None, None, None])


def test_the_hidden_states_stay_where_a_captured_graph_writes_them(scorer):
    rows = Rows(HostScorers({"one": scorer}, POLICY), lambda: 8)
    rows.keep(torch.ones(2, 8))
    place = rows.hidden.data_ptr()
    rows.keep(torch.full((8, 8), 2.0))
    assert rows.hidden.data_ptr() == place
    assert (rows.hidden == 2.0).all()


@pytest.mark.parametrize("late", [False, True])
def test_a_row_s_tokens_are_those_that_the_model_read(late):
    """The scheduler may know the newest one only after the next pass has begun."""
    row = Row(Tilting({}, 0.0, 1.0), one := request([7] if late else [7, 8]))
    assert row.tokens(READ + 2, lambda: 8) == [*one.origin_input_ids, 7, 8]
    with pytest.raises(RuntimeError, match=f"{READ + 3}|{READ + 4}"):
        row.tokens(READ + 4, lambda: 8)


def test_a_request_is_admitted_with_what_it_asks_for(scorer):
    scorers, sampling = HostScorers({"one": scorer}, POLICY), SamplingParams
    assert admitted(None, scorers, sampling) is None
    assert admitted({"other": 1}, None, sampling) is None
    assert admitted({"tilt_weight": 0.0}, scorers, sampling) is None
    assert admitted({"tilt_weight": 2.0, "other": 1}, scorers, sampling).weights == {scorer: 2.0}
    with pytest.raises(FieldError, match=r"tilt_weight: no scorers are named.*PYENGINE_SCORERS"):
        admitted({"other": 1, "tilt_weight": 2.0}, None, sampling)
    with pytest.raises(FieldError, match="tilt_wait"):
        admitted({"tilt_wait": 2.0}, None, sampling)


def test_a_scorer_that_is_a_model_reads_no_more_than_it_can():
    reader = Thing(longest=20, name="reader")
    tilting = Tilting({reader: 1.0}, 0.0, 1.0)
    check_reading(tilting, [1, 2, 29], 20, 30)
    with pytest.raises(InputError, match="reads 20 tokens; prompt and response may have 21"):
        check_reading(tilting, [1, 2], 21, 30)
    with pytest.raises(InputError, match="images"):
        check_reading(tilting, [1, 30], 5, 30)
    check_reading(Tilting({pyengine.load_scorer(pyengine.embedded("prefix")): 1.0}, 0.0, 1.0), [1, 30], 10**9, 30)


def test_the_environment_names_scorers():
    assert scorers_of("good=DIR, brief=x=y,prefix") == {"good": "DIR", "brief": "x=y", "prefix": "prefix"}
    for bad in ("good=", "=DIR", "a=1,a=2", "a=1,,b=2"):
        with pytest.raises(InputError, match="PYENGINE_SCORERS"):
            scorers_of(bad)
    assert gigabytes_of("0.5") == 0.5
    for bad in ("much", "0", "nan"):
        with pytest.raises(InputError, match="PYENGINE_SCORER_CACHE_GB"):
            gigabytes_of(bad)


def moved(path, fields):
    return json.loads(lifted(path, json.dumps(fields).encode()))


TOOL = {"tools": [{"function": {"parameters": {"properties": {"tilt_angle": {"type": "number"}}}}}]}


def test_fields_beside_custom_params_are_lifted_into_them():
    for path, place in CARRY.items():
        for depth in range(len(place)):
            fields = {"prompt": "tilt_weight", "custom_params": None} | TOOL
            inner = fields
            for step in place[:depth]:
                inner[step] = inner = {}
            inner["tilt_weight"] = -8
            found = moved(path, fields)
            for step in place:
                found = found[step]
            assert found == {"tilt_weight": -8}, (path, depth)
    batch = {"sampling_params": [{"tilt_weight": 1}, {"custom_params": {"tilt_weight": 2, "other": 3}}, None]}
    expected = [{"custom_params": {"tilt_weight": 1}}, {"custom_params": {"tilt_weight": 2, "other": 3}}, None]
    assert moved("/generate", batch) == {"sampling_params": expected}
    for body in (b'{"tilt_weight": ', b'["tilt_weight"]', json.dumps(TOOL).encode()):
        assert lifted("/v1/messages", body) == body


WEIGHT = {"tilt_weight": 1}


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        ("/v1/completions", {"vllm_xargs": WEIGHT}, "tilt_weight in vllm_xargs would be dropped"),
        ("/v1/completions", {"extra_body": {"custom_params": WEIGHT}}, "in extra_body.custom_params"),
        ("/v1/completions", {"sampling_params": WEIGHT}, "give it in custom_params"),
        ("/v1/completions", {"custom_params": {"tilt_weight": 2}} | WEIGHT, "given twice"),
        ("/v1/completions", {"custom_params": "x"} | WEIGHT, "custom_params is no object"),
        ("/generate", {"custom_params": WEIGHT}, "give it in sampling_params.custom_params"),
        ("/generate", {"sampling_params": [{}, {}]} | WEIGHT, "in each custom_params"),
        ("/vertex_generate", {"instances": [{"text": "a"} | WEIGHT]}, "in instances"),
        ("/v1/responses", {"custom_params": WEIGHT}, "/v1/responses would drop it"),
        ("/api/generate", {"options": WEIGHT}, "/api/generate would drop it"),
    ],
)
def test_a_field_that_a_route_would_drop_is_named(path, fields, says):
    with pytest.raises(FieldError, match=says) as error:
        moved(path, fields)
    assert error.value.field == "tilt_weight"


def through(parts, path="/v1/completions", root=""):
    """(what the route read, what the client got) of a body that comes in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages += [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]
    read, sent = [], []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def route(scope, receive, send):
        read.extend([await receive(), await receive()])

    asyncio.run(Lift(route)({"type": "http", "method": "POST", "path": root + path, "root_path": root}, receive, send))
    return read, sent


def test_the_body_reaches_the_route_in_one_part_and_then_what_the_client_does():
    read, sent = through([b'{"tilt_', b'weight": 2}'], root="/behind")
    assert json.loads(read[0]["body"]) == {"custom_params": {"tilt_weight": 2}}
    assert read[1]["type"] == "http.disconnect"
    assert not sent
    read, sent = through([b'--x\r\nContent-Disposition: form-data; name="tilt_weight"\r\n\r\n2'], "/v1/audio")
    assert (read, sent[0]["status"]) == ([], 400)
    assert json.loads(sent[1]["body"])["error"]["param"] == "tilt_weight"


def test_what_is_no_tilt_among_custom_params_is_another_processor_s():
    for fields in ({5: 1.0}, {"else": 1.0}, {"tilt_weight": None}, [1], None):
        assert admitted(fields, None, lambda: SamplingParams()) is None
