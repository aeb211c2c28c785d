"""Two records of runs at different times: only what stood beside an anchor in its own run can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyengine.bench import paired
from pyengine.bench.report import Report, entry, read
from pyengine.errors import InputError

# What makes a benchmark of the same name another one; and what moves its ratios though nobody changed it.
TASK = ("model", "strategy", "sizes", "shared", "device", "op", "reward", "prompts", "max_tokens", "strategies")
MACHINE = ("cpu", "threads")


def compare(new: Path, old: Path, threshold: float) -> Report:
    """Each benchmark as a ratio to its group's anchor, in the one record and in the other.

    Absolute times are not compared: between two runs on one machine those of peers that nobody changed have moved by
    three times. A regression's whole interval lies beyond the threshold, after Holm. InputError, naming the file, for
    one that is no record, or where they have no benchmark in common.
    """
    records = read(new), read(old)
    _check_alike(*records, f"{new} and {old}")
    found, before = map(_ratios, records)
    common = [name for name in found if name in before]
    if not common:
        raise InputError(f"{new} and {old} have no benchmark beside an anchor in common")
    changes = {name: paired.change(found[name], before[name]) for name in common}
    tests = [paired.change_exceeds(found[name], before[name], 1 + threshold) for name in common]
    slower = [name for name, p in zip(common, paired.holm(tests), strict=True) if p <= paired.ALARM]
    entries = []
    for name, change in changes.items():
        extra = {"new_takes": change._asdict(), "verdict": verdict(change, threshold, name in slower)}
        entries.append(entry("compare", name, found[name], extra))
    left = sorted({*found, *before} - set(common))
    settings = {"new": str(new), "old": str(old), "threshold": threshold, "regressions": slower}
    said = [f"{name} is in one of the records alone" for name in left]
    said += [f"they ran on another {what}" for what in MACHINE if _differ(*records, "machine", what)]
    rounds = {name: min(len(found[name]), len(before[name])) for name in common}
    said += [
        f"{name}: {n} rounds are too few for {len(common)} rows, no slowdown can be told"
        for name, n in rounds.items()
        if len(common) * paired.least(n) > paired.ALARM
    ]
    return Report("compare", settings, said, entries)


def _check_alike(new: dict[str, Any], old: dict[str, Any], which: str) -> None:
    """InputError, naming what differs, for records of different work."""
    for field in TASK:
        if _differ(new, old, "settings", field):
            raise InputError(f"{which} are of different work: their settings have another {field}")


def _differ(new: dict[str, Any], old: dict[str, Any], part: str, field: str) -> bool:
    return new.get(part, {}).get(field) != old.get(part, {}).get(field)


def verdict(change: paired.Ratio, threshold: float, regressed: bool) -> str:
    """Of a change from old to new, of times."""
    if regressed:
        return "slower"
    if change.high < 1 - threshold:
        return "faster"
    return "the same" if change.low >= 1 - threshold and change.high <= 1 + threshold else "cannot tell"


def _ratios(record: dict[str, Any]) -> dict[str, list[float]]:
    """Of each benchmark that has an anchor in its group: its samples over the anchor's, round by round."""
    found = dict[str, list[float]]()
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in record["benchmarks"]:
        groups.setdefault(one["group"], []).append(one)
    for own in groups.values():
        anchors = [one for one in own if one["extra_info"].get("anchor")]
        for one, anchor in ((one, anchor) for anchor in anchors for one in own):
            times, beside = one["stats"]["data"], anchor["stats"]["data"]
            if one is not anchor and len(times) == len(beside):
                found[f"{one['fullname']} / {anchor['name']}"] = [t / a for t, a in zip(times, beside, strict=True)]
    return found
