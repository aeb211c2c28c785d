"""`pyengine serve`."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from pyengine.cli.load import DTYPES, check_dtype
from pyengine.errors import InputError, real, whole
from pyengine.named import SCORERS
from pyengine.serve.limits import Limits


def serve(
    model: Annotated[str | None, typer.Argument(help="Directory or hub id; default: the embedded model.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SOURCE, a directory, hub id, FILE.py:FUNCTION or embedded name; the first is the default."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="PYENGINE_API_KEY", help="What clients must send as Bearer token.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default on a CPU: float32.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights of eight bits, on a CPU; quicker.")] = None,
    cache_gb: Annotated[
        float | None, typer.Option(help="GB for keys and values (default: a share of what is free).")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Branches decoded at once.")] = 256,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer (default: the model's).")
    ] = None,
    max_requests: Annotated[int, typer.Option(help="Samples under way, waiting ones included.")] = Limits.requests,
    max_queue: Annotated[int, typer.Option(help="Samples that wait for rows.")] = Limits.queue,
    max_k: Annotated[int, typer.Option(help="Branches that a request may ask for.")] = Limits.k,
    max_n: Annotated[int, typer.Option(help="Samples that a request may ask for.")] = Limits.n,
    max_tokens: Annotated[int, typer.Option(help="New tokens that a request may ask for.")] = Limits.max_tokens,
    default_max_tokens: Annotated[
        int, typer.Option(help="New tokens where a request names none.")
    ] = Limits.default_max_tokens,
    max_logprobs: Annotated[int, typer.Option(help="Likeliest tokens that a request may ask for.")] = Limits.logprobs,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes of a request's body.")] = Limits.body_bytes,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = Limits.request_timeout,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds for what is under way, after SIGTERM.")] = 25.0,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Site whose pages may call it (CORS).")] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Write prompts into the log.")] = False,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="A prompt's bits are the same whatever is beside it; slower.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Serve a model over HTTP, to any client of OpenAI's API."""
    try:
        from pyengine.serve.run import ServeOptions, serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install 'tilt-engine[serve]'") from error
    from pyengine.serve.wire import CoreOptions

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    check_dtype(dtype)
    whole(port, "--port", 0)
    whole(max_rows, "--max-rows", 1)
    real(shutdown_timeout, "--shutdown-timeout", 0)
    core = CoreOptions(
        model=model,
        scorers=_scorers(scorer, model),
        device=device,
        dtype=dtype,
        quantize=quantize,
        max_rows=max_rows,
        cache_gb=cache_gb,
        max_model_len=max_model_len,
        batch_invariant=batch_invariant,
        trust_remote_code=trust_remote_code,
    )
    limits = Limits(
        requests=max_requests,
        queue=max_queue,
        k=min(max_k, max_rows),
        n=max_n,
        max_tokens=max_tokens,
        default_max_tokens=min(default_max_tokens, max_tokens),
        logprobs=max_logprobs,
        body_bytes=max_body_bytes,
        request_timeout=request_timeout,
    )
    options = ServeOptions(
        host=host,
        port=port,
        name=served_model_name,
        api_key=api_key or None,
        origins=tuple(allow_origin or ()),
        log_requests=log_requests,
        shutdown_timeout=shutdown_timeout,
    )
    os.environ.pop("PYENGINE_API_KEY", None)  # the core has no use for it
    serve(core, options, limits)


def _scorers(given: list[str] | None, model: str | None) -> tuple[tuple[str, str], ...]:
    """(name, source) each; the embedded model has all embedded ones, unless others are given."""
    if not given:
        return tuple((name, name) for name in SCORERS) if model is None else ()
    found: dict[str, str] = {}
    for one in given:
        name, _, source = one.partition("=")
        if not name or name in found or ("=" in one and not source) or "," in name:
            raise InputError(f"--scorer {one}: give NAME=SOURCE, each name once and without commas")
        found[name] = source or name
    return tuple(found.items())
