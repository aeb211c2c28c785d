"""vLLM's server with scorers, asked by the openai client; the page about it; what is refused at its start."""

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from cases import NEW, WEIGHTS, length

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
SERVE = next(code for language, code in BLOCKS if code.startswith("vllm serve"))
OFFLINE, CLIENT = [code for language, code in BLOCKS if language == "python"]
TEMPLATE = "\"{{ messages[0]['content'] }}\""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def program(code, folder):
    path = folder / "page.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, path], env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextmanager
def serving(folder, case=None):
    """The page's own command at a free port, or the same for a case's model and scorer. The CPU's wheel has no metadata
    under the name that `vllm serve` wants."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = f"exec '{sys.executable}' -m vllm.entrypoints.openai.api_server --model"
    command = SERVE.replace("vllm serve", started).replace("python -c", f"'{sys.executable}' -c").strip()
    if case is not None:
        command = re.sub(r'"\$\(.*?\)"', str(case.model), command).replace('"prefix"', f'"{case.scorer}"')
    log = folder / "server.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            f"{command} --port {port} --host 127.0.0.1 --dtype float32 --enforce-eager "
            f"--enable-scale-out --chat-template {TEMPLATE}",
            shell=True, env=ENVIRONMENT, cwd=folder, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
            for _ in range(400):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(0.5)
            yield client, log
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as (client, log):
        yield client, log


def complete(client, prompt, fields, tokens=NEW, **more):
    body = {"ignore_eos": True, "return_token_ids": True} | fields
    answer = client.completions.create(
        model="policy", prompt=prompt, max_tokens=tokens, **({"temperature": 0} | more), extra_body=body
    )
    return answer.choices[0].token_ids


def is_parity(case, client, log):
    """All at once; half of them with the fields beside the request's own, half in vLLM's place for them."""
    asked = [(i, weight) for weight in WEIGHTS for i in range(len(case.prompts))]

    def one(j):
        i, weight = asked[j]
        fields = {"tilt_weight": weight}
        return complete(client, case.prompts[i], fields if j % 2 else {"vllm_xargs": fields}, length(j))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(len(asked))))
    assert found == [case.tokens[key][: length(j)] for j, key in enumerate(asked)]
    assert "rows are tilted" in log.read_text()


def test_greedy_tokens_over_http_are_those_of_the_reference(cases, server):
    is_parity(cases["embedded"], *server)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_tokens_of_another_model_are_too(cases, name, tmp_path):
    with serving(tmp_path, cases[name]) as (client, log):
        is_parity(cases[name], client, log)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tilt_weight": "much"}, "tilt_weight must be a finite number"),
        ({"tilt_weight": 1, "tilt_scorer": "other"}, "there is no 'other'; there are praise"),
        ({"vllm_xargs": {"tilt_colour": 1}}, "unknown field tilt_colour"),
        ({"tilt_weight": 1, "use_beam_search": True, "n": 2}, "tilt_weight does not go with beam search"),
        ({"tilt_weight": -8, "vllm_xargs": {"tilt_weight": 8}}, "tilt_weight is given twice"),
        ({"extra_args": {"tilt_weight": 8}}, "tilt_weight: /v1/completions would drop it there"),
    ],
)
def test_a_request_that_is_wrong_is_a_400_that_names_the_field(cases, server, fields, says):
    client, _ = server
    case = cases["embedded"]
    with pytest.raises(openai.BadRequestError, match=re.escape(says)):
        complete(client, case.prompts[0], fields)
    assert complete(client, case.prompts[0], {"tilt_weight": 2.0}) == case.tokens[0, 2.0]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_the_other_interfaces_take_the_fields_too(server, api):
    client, _ = server
    fields = {"tilt_weight": 1, "tilt_scorer": "other"}
    if api == "chat":
        ask, said = client.chat.completions.create, {"messages": [{"role": "user", "content": "Review"}]}
    else:
        ask, said = client.responses.create, {"input": "Review"}
    with pytest.raises(openai.BadRequestError, match="there is no 'other'"):
        ask(model="policy", extra_body=fields, **said)


ASKED = {"model": "policy", "max_tokens": 2, "messages": [{"role": "user", "content": "Review"}]}
ROUTES = {  # of those that draw, what each reads
    "/v1/completions": {"model": "policy", "prompt": ["Review", "Of"], "max_tokens": 2},
    "/v1/chat/completions": ASKED,
    "/v1/chat/completions/batch": ASKED | {"messages": [ASKED["messages"]] * 2},
    "/v1/responses": {"model": "policy", "input": "Review", "max_output_tokens": 2},
    "/v1/messages": ASKED,
    "/inference/v1/generate": {"token_ids": [5, 6], "sampling_params": {"max_tokens": 2}},
    "/invocations": ASKED,
    "/v1/completions/render": {"model": "policy", "prompt": "Review", "max_tokens": 2},
    "/v1/chat/completions/render": ASKED,
    "/v1/messages/render": ASKED,
}


def post(client, route, body):
    answer = httpx.post(str(client.base_url.copy_with(path=route)), json=body, timeout=60)
    return answer.status_code, answer.text


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_drops_a_field(server, route):
    """Wherever it stands, it is refused by its name, there or by the engine; without it the route answers."""
    client, _ = server
    body = ROUTES[route]
    if not route.endswith("/render"):  # what these answer is asked with later
        assert post(client, route, body)[0] == 200
        places = [{"tilt_weight": "much"}, {"vllm_xargs": {"tilt_weight": "much"}}]
    else:
        places = [{"extra_args": {"tilt_weight": 1}}]
    if "sampling_params" in body:
        places += [
            {"sampling_params": {"tilt_weight": 1}},
            {"sampling_params": {"extra_args": {"tilt_weight": "much"}}},
        ]
    for fields in places:
        status, said = post(client, route, body | fields)
        assert status == 400, (fields, said)
        assert "tilt_weight" in said


@pytest.mark.parametrize("route", [route for route in ROUTES if route.endswith("/render")])
def test_what_is_rendered_keeps_its_fields(server, route):
    client, _ = server
    places = [{"vllm_xargs": {"tilt_weight": 3.5}}] + [{"tilt_weight": 3.5}] * ("messages/" not in route)
    for fields in places:
        status, said = post(client, route, ROUTES[route] | fields)
        assert status == 200, said
        assert '"tilt_weight":3.5' in said


def test_a_stream_says_what_is_wrong_in_its_first_event(server):
    """As the page says: the answer is 200 by then."""
    client, _ = server
    for route in ("/v1/completions", "/v1/chat/completions"):
        status, said = post(client, route, ROUTES[route] | {"stream": True, "tilt_weight": "much"})
        assert status == 200
        assert said.startswith('data: {"error": {"message": "tilt_weight must be a finite number')


def test_metrics_count_the_rows_that_were_tilted(cases, server):
    client, _ = server

    def counted():
        said = httpx.get(str(client.base_url.copy_with(path="/metrics")), timeout=60).text
        assert "vllm:num_requests_running" in said
        return float(re.search(r"^pyengine_tilted_rows ([\d.e+]+)$", said, re.MULTILINE)[1])

    before = counted()
    complete(client, cases["embedded"].prompts[0], {"tilt_weight": 2.0}, 7)
    complete(client, cases["embedded"].prompts[0], {}, 7)
    assert counted() - before == 7


def test_the_pages_client(server, tmp_path):
    client, _ = server
    at = str(client.base_url)
    assert len(program(CLIENT.replace("http://127.0.0.1:8000/v1", at), tmp_path).strip()) > 40


def test_the_pages_offline_example(tmp_path):
    """In vLLM's own processes, as it starts them by default."""
    said = program(OFFLINE, tmp_path)
    rows = int(re.search(r"\[(\d+)\] rows of logits were tilted", said)[1])
    assert 3 <= rows <= 3 * 24
    assert len(re.findall(r"^\{'tilt_", said, re.MULTILINE)) == 3
