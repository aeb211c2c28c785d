"""The command line: `pyengine generate`, `label`, `pairs`, `train`, `curve`, `demo`, `info`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

import pyengine
from pyengine import cli_data
from pyengine.cli_align import train
from pyengine.cli_load import SCORERS, conditioned, load_engine, make_scorer, quiet_loading
from pyengine.errors import InputError, RequestError, whole

if TYPE_CHECKING:
    from pyengine.results import Event, Result
    from pyengine.strategies import Strategy

app = typer.Typer(
    help="Reward-guided decoding for frozen language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")
app.command()(cli_data.label)
app.command()(cli_data.pairs)

# strategy -> the options that it uses
STRATEGIES: dict[str, tuple[str, ...]] = {
    "base": (),
    "tokenwise": ("weight",),
    "blockwise": ("k", "block", "beta"),
    "best-of-k": ("k", "beta"),
    "q-probe": ("k", "beta"),
}


def make_strategy(name: str, options: dict[str, Any]) -> Strategy:
    """The named strategy; an option that it does not use is an error, not ignored."""
    from pyengine.strategies import BASE, BestOfK, Blockwise, Tokenwise

    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; choose from {', '.join(STRATEGIES)}")
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in STRATEGIES[name]:
            users = [s for s, used in STRATEGIES.items() if option in used]
            raise InputError(f"--{option} is not used by strategy {name!r} (it is by {', '.join(users)})")
    soft: dict[str, Any] = {"selection": "softmax", "beta": given["beta"]} if "beta" in given else {}
    if name == "base":
        return BASE
    if name == "tokenwise":
        return Tokenwise(given.get("weight", 1.0))
    if name == "blockwise":
        return Blockwise(given.get("k", 8), given.get("block", 16), **soft)
    if name == "q-probe":
        soft = {"selection": "softmax", "beta": given.get("beta", 0.1)}
    return BestOfK(given.get("k", 8), **soft)


class Complaints:
    """What was wrong with single lines: printed as it is found, and counted, while the others go on."""

    made = 0

    def __call__(self, message: str) -> None:
        self.made += 1
        print(f"pyengine: {message}", file=sys.stderr)


class Row(NamedTuple):
    """One prompt of the command: where it came from, what it is, and what else its line of JSONL holds."""

    where: str
    prompt: Any
    rest: dict[str, Any]


def read_rows(arguments: list[str], file: Path | None, complain: Any) -> Iterator[Row]:
    """The prompts of the arguments, else of a JSONL file, else of the lines of stdin.

    A JSONL line that cannot be used goes to `complain`, with its number; the others still come.
    """
    from pyengine.jsonl import json_object, lines_of, prompt_of

    if arguments and file:
        raise InputError("give prompts as arguments or with --input, not both")
    if arguments:
        yield from (Row(f"prompt {i + 1}", a, {}) for i, a in enumerate(arguments))
    elif file is None:
        if sys.stdin.isatty():
            raise InputError("no prompt: give one as an argument, on stdin or with --input FILE.jsonl")
        try:
            for i, line in enumerate(sys.stdin, 1):
                text = line.removeprefix("\ufeff" if i == 1 else "").rstrip("\r\n")
                if text.strip():
                    yield Row(f"stdin line {i}", text, {})
        except UnicodeDecodeError as error:
            raise InputError(f"stdin is not text in {error.encoding}: byte {error.start} {error.reason}") from error
    else:
        for where, line in lines_of(file):
            try:
                record = json_object(line, where)
                yield Row(where, prompt_of(record, where), record)
            except InputError as error:
                complain(str(error))


def to_json(record: Any) -> str:
    """JSON; a score that is not finite becomes null."""
    from pyengine.results import finite

    return json.dumps(finite(record), allow_nan=False)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; without any, stdin is read.")] = None,
    input: Annotated[
        Path | None, typer.Option(help='JSONL file, a "prompt" (text), "prompt_ids" or "messages" a line.')
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded model.")] = None,
    scorer: Annotated[str | None, typer.Option(help=f"Directory, hub id or embedded: {', '.join(SCORERS)}.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"{', '.join(STRATEGIES)}; default: blockwise with a scorer, else base.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Branches (default: 8).")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens in a block (default: 16).")] = None,
    weight: Annotated[float | None, typer.Option(help="Strength λ of tokenwise (default: 1).")] = None,
    beta: Annotated[float | None, typer.Option(help="Select from softmax(utility / beta) instead of argmax.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed and prompt, same result.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cache_gb: Annotated[
        float | None, typer.Option(help="GB for keys and values (default: a share of what is free).")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="A prompt's bits are the same whatever is beside it; slower.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print each token or block as it is committed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with what its row holds.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Prompts as they are, though the model has a chat template.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    score: Annotated[
        float | None, typer.Option(help="Reward to ask a policy of `train offline --method ca` for, in deviations.")
    ] = None,
) -> None:
    """Decode prompts with a strategy."""
    from pyengine.results import SamplingParams

    name = strategy or ("base" if scorer is None else "blockwise")
    plan = make_strategy(name, {"k": k, "block": block, "weight": weight, "beta": beta})
    sampling = SamplingParams(max_tokens, temperature, top_k, top_p, min_p, seed)
    complain = Complaints()
    found = list(read_rows(list(prompts or []), input, complain))
    if not found:
        raise InputError(f"no usable prompt in {input}" if input else "no prompt on stdin")
    asking = conditioned(model, score)
    engine = load_engine(model, scorer, device, cache_gb, trust_remote_code, batch_invariant)
    usable: list[Row] = []
    for row in found:
        prompt = asking(row.prompt)
        if type(prompt) is str and engine.codec.templated and not raw and score is None:
            prompt = [{"role": "user", "content": prompt}]
        try:
            engine.encode(prompt, row.where)
        except InputError as error:
            complain(str(error))
        else:
            usable.append(row._replace(prompt=prompt))
    if not usable:
        raise typer.Exit(2)
    printed = 0
    if stream:
        for row in usable:
            try:
                for event in engine.stream(row.prompt, plan, sampling):
                    show_event(event, row, as_json)
            except RequestError as error:
                complain(f"{row.where}: {error.reason}")
            else:
                printed += 1
    else:
        for index, outcome in engine.as_completed([row.prompt for row in usable], plan, sampling):
            if isinstance(outcome, InputError):
                reason = outcome.reason if isinstance(outcome, RequestError) else outcome
                complain(f"{usable[index].where}: {reason}")
            else:
                show_result(outcome, usable[index], as_json)
                printed += 1
    if complain.made:
        if complain.made + printed > 1:
            print(f"pyengine: {complain.made} of {complain.made + printed} prompts failed", file=sys.stderr)
        raise typer.Exit(1)


def show_event(event: Event, row: Row, as_json: bool) -> None:
    if as_json:
        record = {"text": event.text, "tokens": event.tokens}
        print(to_json(record | ({"result": row.rest | event.result.to_dict()} if event.result else {})), flush=True)
    else:
        print(event.text, end="" if event.result is None else "\n", flush=True)


def show_result(result: Result, row: Row, as_json: bool) -> None:
    """A line of JSON keeps what else its row holds, an id say."""
    if as_json:
        print(to_json(row.rest | result.to_dict()), flush=True)
    else:
        reward = "" if result.reward is None else f"reward {result.reward:.3f}, "
        prompt = row.prompt[-1]["content"] + "\n" if isinstance(row.prompt, list) else result.prompt
        print(f"{prompt}{result.text}\n  [{reward}KL {result.kl:.2f} nats ({result.kl_kind})]", flush=True)


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 64,
    k: Annotated[int, typer.Option(help="Branches.")] = 8,
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 16,
    weight: Annotated[float, typer.Option(help="Strength λ of tokenwise.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    svg: Annotated[Path | None, typer.Option(help="Also write the output as a picture.")] = None,
) -> None:
    """All strategies side by side, on the embedded model, the same prompts and seeds."""
    from pyengine.demo import run

    quiet_loading()
    whole(prompts, "demo: --prompts", 1)
    if svg and not svg.absolute().parent.is_dir():
        raise InputError(f"demo: --svg {svg}: no such directory")
    run(prompts, k, block, weight, seed, svg)


@app.command()
def curve(
    out: Annotated[Path, typer.Option(help="Writes OUT.png and OUT.json.")] = Path("curve"),
    prompts: Annotated[int, typer.Option(help="Prompts for the embedded model, or of --input at most.")] = 64,
    input: Annotated[Path | None, typer.Option(help='JSONL file, one {"prompt": ...} a line.')] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded model.")] = None,
    scorer: Annotated[str, typer.Option(help=f"What is followed: directory, hub id, {', '.join(SCORERS)}.")] = "prefix",
    reward: Annotated[
        str | None, typer.Option(help="What is measured, and what best-of-K follows; default: the scorer.")
    ] = None,
    tokenwise: Annotated[str, typer.Option(help="Weights λ; empty is none.")] = "1,2,4,8",
    blockwise: Annotated[str, typer.Option(help="K x M, as in 4x16; empty is none.")] = "2x16,4x16,8x16,8x8",
    best_of_k: Annotated[str, typer.Option(help="K; empty is none.")] = "2,4,8,16",
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of every strategy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Reward against KL of chosen strategies: a picture, a table and a JSON file."""
    from pyengine import curve as curves
    from pyengine.results import SamplingParams
    from pyengine.strategies import BestOfK, Blockwise, Tokenwise
    from pyengine.training.shards import room_in

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("curve: drawing needs matplotlib: pip install 'tilt-engine[train]'") from error
    whole(prompts, "curve: --prompts", 1)
    if not out.absolute().parent.is_dir():
        raise InputError(f"curve: --out {out}: no such directory")
    room_in(out.parent, out)
    complain = Complaints()
    followed, measured = make_scorer(scorer), None if reward is None else make_scorer(reward)
    plans: list[Any] = [(Tokenwise(w), followed) for (w,) in settings(tokenwise, "--tokenwise", float)]
    plans += [(Blockwise(k, m), followed) for k, m in settings(blockwise, "--blockwise", int, int)]
    plans += [(BestOfK(k), measured or followed) for (k,) in settings(best_of_k, "--best-of-k", int)]
    if model is None and input is None:
        from pyengine.worlds import reviews

        texts = reviews.prompts(prompts)
    else:
        texts = [row.prompt for row in read_rows([], input, complain)][:prompts]
    engine = load_engine(model, None, device, None, trust_remote_code)
    sampling = [SamplingParams(max_tokens, temperature, seed=seed + i) for i in range(len(texts))]
    points = curves.measure(engine, texts, plans, measured, sampling)
    curves.report(points)
    about = {"model": engine.name, "scorer": scorer, "reward": reward or scorer, "prompts": len(texts), "seed": seed}
    curves.save(points, out.with_name(out.name + ".json"), **about)
    title = f"{engine.name}, {len(texts)} prompts, following {scorer}"
    curves.draw(points, out.with_name(out.name + ".png"), title, reward or scorer)
    if complain.made:
        raise typer.Exit(2)


def settings(text: str, option: str, *types: Any) -> list[tuple[Any, ...]]:
    """The comma-separated settings of an option; the numbers of one are separated by x."""
    found = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        numbers = item.split("x")
        try:
            found.append(tuple(of(number) for of, number in zip(types, numbers, strict=True)))
        except ValueError:
            wanted = "x".join("4" for _ in types)
            raise InputError(f"curve: {option}: {item!r} is not of the form {wanted}") from None
    return found


@app.command()
def info() -> None:
    """Versions, the backends that are there, and why one is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    for label, value in report():
        table.add_row(label, value)
    Console().print(table)


def report() -> Iterator[tuple[str, str]]:
    """(what, its state) for `pyengine info`."""
    import torch

    from pyengine import _C, ops

    yield "tilt-engine", pyengine.__version__
    yield "python", f"{platform.python_version()} on {platform.machine()}"
    for package in ("torch", "transformers", "tokenizers", "safetensors"):
        yield package, importlib.metadata.version(package)
    yield "CPU kernels", f"C++ with {ops.common.instruction_set()}, built by {_C.compiler()}"
    built = ", ".join(_C.cuda_architectures())
    yield "CUDA kernels", f"built for {built}" if built else "not built (needs nvcc; PYENGINE_CUDA=ON insists)"
    yield "threads", str(torch.get_num_threads())
    if torch.cuda.is_available():
        yield "GPU", f"{torch.cuda.get_device_name()}; tilt_sample runs {ops.common.gpu_backend('info', 'tilt')}"
    elif torch.version.cuda is None:
        yield "GPU", f"missing: torch {torch.__version__} is built without CUDA"
    else:
        yield "GPU", f"missing: torch is built for CUDA {torch.version.cuda}, but finds no device"
    for package, use in (
        ("triton", "GPU kernels of all ops"),
        ("flash_attn", "attention on a GPU with PYENGINE_ATTENTION=flash"),
    ):
        try:
            there = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            there = ""
        yield package.replace("_", "-"), f"{there or 'not installed'}; {use}"


def fail(message: str) -> NoReturn:
    print(f"pyengine: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# click's ClickException, wherever typer keeps click: older versions import it, newer ones carry their own.
ClickException: Any = typer.BadParameter.__mro__[2]


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal's encoding lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except InputError as error:
        fail(str(error))
    except ClickException as error:
        fail(error.format_message())
    except BrokenPipeError:  # the reader has gone: `pyengine generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)
