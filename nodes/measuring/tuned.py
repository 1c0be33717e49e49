"""What Tune reports: the plans that were tried as plain data, what follows from them, and both as Markdown.

As with the Benchmark's, the dictionary is what is saved, drawn on the canvas and written as text.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from .search import Candidate, Check, Found, Search
from .statistics import Ratio, paired
from .trials import EXACT, Log

SCHEMA = 1

STATES = {
    "untried": "not tried",
    "slower": "not faster",
    "below the floor": "below the floor",
    "unlikely": "would not hold on other pictures",
    "failed": "failed",
    "unfinished": "not tried to the end",
    "holds": "holds",
    "failed the check": "failed the check",
}
"""What became of a plan, in words."""


def plan_as_dict(one: Candidate, search: Search, log: Log) -> dict[str, Any]:
    """What is known of one plan, JSON-ready.

    Its `speed` is how many times as fast it is, its `worst` and `mean` similarities are of the pictures of the search,
    `next` is what one more picture's stays above in 95 of 100 cases.
    """
    similar = [log.similarities(one.key)[at] for at in search.pictures if at in log.similarities(one.key)]
    logs = [-log for log in log.usual(one.key, search.pictures)]
    ratio = log.ratio(one.key, search.pictures)
    first_s, exact_s = log.first_s(one.key), log.exact_s()
    saved_s = exact_s * (1 - ratio) if exact_s is not None and ratio is not None else 0.0
    return {
        "name": one.name,
        "state": search.state(one),
        "speed": speed_as_dict(paired(logs)) if logs else None,
        "worst": min(similar, default=None),
        "mean": math.fsum(similar) / len(similar) if similar else None,
        "next": search.next_similarity(one),
        "pictures": len(similar),
        "work": log.share(one.key),
        "first_s": first_s,
        "pays_back": math.ceil(first_s / saved_s) if first_s and saved_s > 0 else None,
        "problem": log.problem(one.key),
    }


def speed_as_dict(ratio: Ratio) -> dict[str, Any]:
    """A ratio, JSON-ready, with itself in words."""
    return {**asdict(ratio), "is_difference": ratio.is_difference, "text": str(ratio).replace("one round", "one run")}


def check_as_dict(check: Check) -> dict[str, Any]:
    """A check on fresh seeds, JSON-ready."""
    return {
        "name": check.plan.name,
        "worst": check.worst,
        "speed": None if check.speed is None else speed_as_dict(check.speed),
        "holds": check.holds,
        "pictures": len(check.pictures),
        "problem": check.problem,
    }


def as_dict(search: Search, found: Found) -> dict[str, Any]:
    """What a search came to so far, JSON-ready: the fastest plan first."""
    log = search.log
    ones = [*search.tried(), *([found.rival] if found.rival is not None and log.of(found.rival.key) else [])]
    plans = [plan_as_dict(one, search, log) for one in ones]
    plans.sort(key=lambda plan: -plan["speed"]["value"] if plan["speed"] else 0.0)
    return {
        "exact_s": log.exact_s(),
        "plans": plans,
        "checks": [check_as_dict(check) for check in found.checks],
        "best": None if found.best is None else found.best.name,
        "rival": None if found.rival is None else found.rival.name,
        "is_complete": found.is_complete,
        "runs": len(log.trials),
        "exact_runs": len(log.of(EXACT)),
        "unsteady": log.unsteady(),
        "pictures": len(search.pictures),
    }


def summary(report: dict[str, Any]) -> str:
    """What came of it in one sentence."""
    metric, floor = report["metric"], f"{report['floor']:g}"
    tried = f"{len(report['plans'])} plans tried in {report['runs']} runs"
    failed = sum(not check["holds"] for check in report["checks"])
    if report["chosen"] is not None and report["chosen"] != report["best"]:
        return f"chosen: {report['chosen']}; the best one is {report['best'] or 'not known yet'} ({tried})"
    if report["best"] is None:
        if not report["is_complete"]:
            why = f"{failed} failed on fresh seeds, and it" if failed else "it"
            return f"no plan yet: {why} has not been measured to the end; the model is as it came ({tried})"
        if failed:
            return f"no plan: {failed} failed on fresh seeds; the model is as it came ({tried})"
        return f"nothing is faster with {metric} {floor} or more; the model is as it came ({tried})"
    ending = "" if report["is_complete"] else ", and there may be better ones: run it again"
    return f"{best(report)} ({tried}{ending})"


def best(report: dict[str, Any]) -> str:
    """The best plan in words, by its check; of a search that was stopped before that, by its own pictures."""
    found = (check for check in report["checks"] if check["name"] == report["best"] and check["holds"])
    check, where = next(found, None), "at the worst on fresh seeds"
    if check is None:
        check = next(plan for plan in report["plans"] if plan["name"] == report["best"])
        where = "at the worst so far, not checked on fresh seeds yet"
    return f"{report['best']}: {check['speed']['text']}, {report['metric']} {check['worst']:.4f} {where}"


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a text to paste anywhere."""
    metric = report["metric"]
    columns = ["plan", "speed", f"worst {metric}", f"mean {metric}", "one more picture", "pictures", "work", "result"]
    lines = [
        f"### {report['title']}",
        "",
        f"{report['status']}{': ' + report['reason'] if report['reason'] else ''}; {report['summary']}.",
        "",
        _row(columns),
        "|" + "---|" * len(columns),
        _row(["as it is", _time(report["exact_s"]), "-", "-", "-", "-", "100 %", "exact"]),
        *(_row(_cells(plan, report)) for plan in report["plans"]),
        "",
        f"The floor is {metric} {report['floor']:g}, for the worst of {report['pictures']} pictures and for one more "
        "picture in 95 of 100 cases. Speed is against the exact model, which ran in between.",
        "",
        *(f"- {line}" for line in told(report)),
        *(f"- {note}" for note in report["notes"]),
    ]
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items() if value)
    return "\n".join([*lines, "", f"{machine}."]) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _cells(plan: dict[str, Any], report: dict[str, Any]) -> list[str]:
    figures = [f"{plan[name]:.4f}" if plan[name] is not None else "-" for name in ("worst", "mean", "next")]
    result = STATES[plan["state"]] + (f": {plan['problem']}" if plan["problem"] else "")
    if plan["name"] == report["rival"]:
        result = f"fewer steps, as fast as the plan: {result}"
    if plan["name"] == report["chosen"]:
        result = f"**chosen**, {result}"
    work = "-" if plan["work"] is None else f"{plan['work']:.0%}".replace("%", " %")
    return [
        plan["name"],
        plan["speed"]["text"] if plan["speed"] else "-",
        *figures,
        str(plan["pictures"]),
        work,
        result,
    ]


def _check(check: dict[str, Any], metric: str) -> str:
    seeds = f"{check['name']}, on {check['pictures']} pictures that the search never saw"
    if check["worst"] is None:
        return f"{seeds}: {check['problem']}"
    result = "holds" if check["holds"] else "does not hold"
    return f"{seeds}: {result}, {metric} {check['worst']:.4f} at the worst, {check['speed']['text']}"


def told(report: dict[str, Any]) -> list[str]:
    """What a reader should know besides the figures of the plans, a line each."""
    told = [_check(check, report["metric"]) for check in report["checks"]]
    if report["unsteady"]:
        runs = "1 run" if report["unsteady"] == 1 else f"{report['unsteady']} runs"
        told.append(
            f"the machine was faster or slower after {runs} than before: their times count where a plan has no others"
        )
    for plan in report["plans"]:
        if plan["first_s"] and plan["pays_back"] is not None:
            pictures = "1 picture" if plan["pays_back"] == 1 else f"{plan['pays_back']} pictures"
            told.append(f"{plan['name']}: {_time(plan['first_s'])} more the first time, pays back after {pictures}")
    rival = next((plan for plan in report["plans"] if plan["name"] == report["rival"]), None)
    if rival is not None and rival["state"] == "holds":
        told.append(f"{rival['name']} alone are as fast as the plan and hold too: set steps lower instead")
    return told
