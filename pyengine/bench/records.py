"""Two records of runs at different times: only what stood beside an anchor in its own run can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyengine.bench import paired
from pyengine.bench.report import Report, entry, read
from pyengine.errors import InputError


def compare(new: Path, old: Path, threshold: float) -> Report:
    """Each benchmark as a ratio to its group's anchor, in the one record and in the other.

    Absolute times are not compared: between two runs on one machine those of peers that nobody changed have moved by
    three times. A regression's whole interval lies beyond the threshold, after Holm. InputError, naming the file, for
    one that is no record, or where they have no benchmark in common.
    """
    found, before = _ratios(new), _ratios(old)
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
    return Report("compare", settings, [f"{name} is in one of the records alone" for name in left], entries)


def verdict(change: paired.Ratio, threshold: float, regressed: bool) -> str:
    """Of a change from old to new, of times."""
    if regressed:
        return "slower"
    if change.high < 1 - threshold:
        return "faster"
    return "the same" if change.low >= 1 - threshold and change.high <= 1 + threshold else "cannot tell"


def _ratios(path: Path) -> dict[str, list[float]]:
    """Of each benchmark that has an anchor in its group: its samples over the anchor's, round by round."""
    found = dict[str, list[float]]()
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in read(path)["benchmarks"]:
        groups.setdefault(one["group"], []).append(one)
    for own in groups.values():
        anchors = [one for one in own if one["extra_info"].get("anchor")]
        for one, anchor in ((one, anchor) for anchor in anchors for one in own):
            times, beside = one["stats"]["data"], anchor["stats"]["data"]
            if one is not anchor and len(times) == len(beside):
                found[f"{one['fullname']} / {anchor['name']}"] = [t / a for t, a in zip(times, beside, strict=True)]
    return found
