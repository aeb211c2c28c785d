"""What SGLang with pyengine refuses before it starts processes: python sglang_refusals.py CASES.json, in which
{"model": directory, "settings": {case: settings of ServerArgs}, "stand_ins": {setting: value}, "scorers": {case:
directory}}. Prints JSON, {case: what was said}.
"""

import importlib.metadata
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace


def said(run, *arguments):
    try:
        run(*arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is what was asked for
        return f"{type(error).__name__}: {error}"
    return None


def arguments_of(model, settings):
    """By the steps that SGLang takes before it starts processes."""
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=model, **{"device": "cpu", "attention_backend": "torch_native"} | settings)
    arguments.resolve_once()
    arguments.check_server_args()
    return arguments


def stand_in(private, arguments, name, value):
    """A setting that SGLang itself does not take on this machine."""
    known = {one: getattr(private.resolving_view(arguments), one) for one in private.ONLY}
    private.check_settings(lambda settings: None, SimpleNamespace(**known | {name: value}))


def load(private, arguments, source, of_its_own=True):
    """The scorers of a server beside a model of this shape, of width 64, 745 tokens and two layers."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from torch import nn

    processor = LogitsProcessor.__new__(LogitsProcessor)
    nn.Module.__init__(processor)
    private._sources = {"one": source}
    config = SimpleNamespace(vocab_size=745, hidden_size=64, num_hidden_layers=2)
    model = nn.Sequential(nn.Linear(1, 1), processor if of_its_own else nn.Identity())
    private.load_scorers(None, SimpleNamespace(server_args=arguments, model=model, model_config=config))


def missing_hook(private, arguments):
    target = next(iter(private.HOOKS))
    private.HookRegistry._patched.remove(target)
    try:
        private.check_settings(lambda settings: None, arguments)
    finally:
        private.HookRegistry._patched.add(target)


def another_version():
    """The plugin in an SGLang that it does not know."""
    from pyengine.integrations import sglang

    sys.modules.pop("pyengine.integrations.sglang.private")
    del sglang.private
    importlib.metadata.version = lambda name: "0.5.24"
    sglang.register()


def untilted_token(private):
    """A request that is tilted gets a token that nobody tilted."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    from pyengine.integrations.sglang.rows import Row, Rows

    private._rows = Rows(SimpleNamespace(forget=lambda row: None), lambda: 8)
    req = Req.__new__(Req)  # __init__ wants a server's settings
    req.__dict__ |= {"finished_reason": None, "to_finish": None, "sampling_params": SamplingParams(max_new_tokens=9)}
    req.__dict__ |= {"origin_input_ids": array("q", [5, 6]), "output_ids": array("q", [7])}
    req.pyengine_row = Row(None, req)
    req.update_finish_state()
    raise RuntimeError(req.finished_reason.to_json())


def failing_admission(private):
    """What a request ends with that pyengine fails to check, for whatever reason."""

    def fail(*args):
        raise ZeroDivisionError("of its own")

    drawn = {"max_new_tokens": 1, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    params = SimpleNamespace(custom_params={"tilt_weight": 1.0}, **drawn)
    private._rows = SimpleNamespace(scorers=SimpleNamespace(tilting=fail))
    ended = []
    req = SimpleNamespace(to_finish=None, sampling_params=params)
    req.set_finish_with_abort = lambda *said: setattr(req, "to_finish", said)
    queue = SimpleNamespace(retire_unadmitted_request=ended.append)
    private.admit(lambda *args: ended.append("queued"), queue, req)
    params.custom_params = Unreadable(tilt_weight=1.0)
    beams = private.refuse_beams(lambda *args: None, None, req, req)
    raise RuntimeError(f"{ended == [req]} {req.to_finish} {beams}")


class Unreadable(dict):
    def items(self):
        raise ZeroDivisionError("of its own")


def main(file):
    from sglang.srt.plugins import load_plugins

    cases = json.loads(Path(file).read_text())
    load_plugins()
    from pyengine.integrations.sglang import private

    model = cases["model"]
    arguments = arguments_of(model, {})
    found = {case: said(arguments_of, model, settings) for case, settings in cases["settings"].items()}
    found |= {case: said(stand_in, private, arguments, case, value) for case, value in cases["stand_ins"].items()}
    found |= {case: said(load, private, arguments, source) for case, source in cases["scorers"].items()}
    found["processor"] = said(load, private, arguments, next(iter(cases["scorers"].values())), False)
    found["hook"] = said(missing_hook, private, arguments)
    found["admission"] = said(failing_admission, private)
    found["token"] = said(untilted_token, private)
    found["version"] = said(another_version)
    print(json.dumps({"known": sorted(private.ONLY), "said": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
