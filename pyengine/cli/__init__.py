"""The command line: `pyengine generate`, `bench`, `serve`, `label`, `pairs`, `train`, `curve`, `model` and others."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any, NoReturn

import typer

from pyengine.cli import align, bench, compare, data, generate, info, model, profile, serve, train
from pyengine.errors import InputError

app = typer.Typer(
    help="Reward-guided decoding for frozen language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    generate.generate,
    profile.profile,
    serve.serve,
    data.label,
    data.pairs,
    compare.curve,
    compare.demo,
    info.info,
    model.model,
):
    app.command()(command)
for policy in (align.preference, align.offline):
    train.app.command()(policy)
app.add_typer(train.app, name="train")
app.add_typer(bench.app, name="bench")


def fail(message: str) -> NoReturn:
    print(f"pyengine: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# click's ClickException, wherever typer keeps click: older versions import it, newer ones carry their own.
ClickException: Any = typer.BadParameter.__mro__[2]


def _part() -> None:
    """The processes of a training part before they end, with whatever holds their group, so that its threads end, too.
    One of them may let go of a tensor while the interpreter ends, which aborts the process, and with it a run that has
    done its work."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal's encoding lacks is escaped, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        _part()
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
