"""`pyengine curve` and `pyengine demo`: strategies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyengine.cli.load import SCORERS, Complaints, load_engine, quiet_loading, read_rows, said
from pyengine.errors import InputError, whole
from pyengine.expression import scorer_of


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


def curve(
    out: Annotated[Path, typer.Option(help="Writes OUT.png and OUT.json.")] = Path("curve"),
    prompts: Annotated[int, typer.Option(help="Prompts for the embedded model, or of --input at most.")] = 64,
    input: Annotated[Path | None, typer.Option(help='JSONL file, one {"prompt": ...} a line.')] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; default: the embedded model.")] = None,
    scorer: Annotated[list[str] | None, typer.Option(help=f"What is followed (default: prefix): {SCORERS}.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="What is measured, and what best-of-K follows; default: the scorer.")
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
    from pyengine.evaluation import curve as curves
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
    names = said("--scorer", scorer) or "prefix", said("--reward", reward)
    followed, measured = scorer_of(names[0]), None if names[1] is None else scorer_of(names[1])
    judged = names[1] or names[0]
    plans: list[Any] = [(Tokenwise(w), followed) for (w,) in settings(tokenwise, "--tokenwise", float)]
    plans += [(Blockwise(k, m), followed) for k, m in settings(blockwise, "--blockwise", int, int)]
    plans += [(BestOfK(k), measured or followed) for (k,) in settings(best_of_k, "--best-of-k", int)]
    if model is None and input is None:
        from pyengine.worlds import reviews

        texts = reviews.prompts(prompts)
    else:
        texts = [row.prompt for row in read_rows([], input, complain)][:prompts]
    engine = load_engine(model, None, device, trust_remote_code=trust_remote_code)
    sampling = [SamplingParams(max_tokens, temperature, seed=seed + i) for i in range(len(texts))]
    points = curves.measure(engine, texts, plans, measured, sampling)
    curves.report(points)
    about = {"model": engine.name, "scorer": names[0], "reward": judged, "prompts": len(texts), "seed": seed}
    curves.save(points, out.with_name(out.name + ".json"), **about)
    title = f"{engine.name}, {len(texts)} prompts, following {names[0]}"
    curves.draw(points, out.with_name(out.name + ".png"), title, judged)
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
