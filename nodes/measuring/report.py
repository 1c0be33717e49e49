"""A benchmark's report: what was measured as plain data, what follows from it, and both as Markdown.

The dictionary that `Report.as_dict` makes is what is saved as JSON, what the panel on the canvas draws
and what `to_markdown` writes: none of them knows more than another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .fidelity import Fidelity
from .memory import Peak
from .statistics import Ratio, Summary, speedup

SCHEMA = 1
Role = Literal["baseline", "candidate", "ablation", "rival"]
Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Measured:
    """One run of a variant.

    Attributes:
        seconds: of the whole sampler call, less `loading_s`.
        loading_s: in which the host brought weights to the device.
        step_s: seconds of each step in the order they ran.
        evaluations: times the sampler asked for a prediction.
        predictions: conditions that went through the network; one in a batch of two counts two.
        rows: rows of all batches that went through the network.
        memory: on the device; on a CPU, of the process.
        ram: of the process.
        graphs: graphs that torch.compile made in this run.
        compile_s: seconds it took to make them.
        decode_s: seconds of the VAE's decode, less loading; None if it was not timed.
        decode_memory: as `memory`, while decoding.
    """

    seconds: float
    loading_s: float
    step_s: tuple[float, ...]
    evaluations: int
    predictions: int
    rows: int
    memory: Peak
    ram: Peak
    graphs: int = 0
    compile_s: float = 0.0
    decode_s: float | None = None
    decode_memory: Peak | None = None

    @property
    def parts_s(self) -> tuple[float, ...]:
        """The steps, and the rest."""
        return (*self.step_s, self.seconds - sum(self.step_s))


@dataclass
class Variant:
    """One of the models that are compared.

    Attributes:
        name: such as ``candidate`` or ``without DeepCache``.
        methods: the plan's methods in canonical order: title, settings, nodes.
        warm_up: its first run, which is not part of the statistics.
        runs: the others.
        fidelity: against the baseline, the mean of all pictures so far; None until both were seen, and for what is not
            finite.
        worst: the worst of each figure of the pictures, where there are several seeds.
        verdicts: what its methods said of the last run: title, state, text.
        image: where its picture is, as the host names pictures.
        problems: what a reader must know before the figures.
    """

    name: str
    role: Role
    methods: list[dict[str, Any]] = field(default_factory=list)
    warm_up: Measured | None = None
    runs: list[Measured] = field(default_factory=list)
    fidelity: Fidelity | None = None
    worst: Fidelity | None = None
    verdicts: list[dict[str, str]] = field(default_factory=list)
    image: dict[str, str] | None = None
    problems: list[str] = field(default_factory=list)

    def as_dict(self, baseline: Variant, is_device: bool) -> dict[str, Any]:
        """JSON-ready, with what follows from the runs."""
        runs = self.runs
        rounds = min(len(runs), len(baseline.runs))
        memory = "peak_mib" if is_device else "increase_mib"
        decode = [run.decode_s for run in runs if run.decode_s is not None]
        last = runs[-1] if runs else self.warm_up
        return {
            **asdict(self),
            "time_s": _summary(run.seconds for run in runs),
            "step_s": _summary(second for run in runs for second in run.step_s),
            "decode_s": _summary(decode),
            "speedup": None if self is baseline else _speedup(baseline.runs[:rounds], runs[:rounds]),
            "memory_mib": _summary(getattr(run.memory, memory) for run in runs),
            "decode_memory_mib": _summary(getattr(run.decode_memory, memory) for run in runs if run.decode_memory),
            "evaluations": last.evaluations if last else None,
            "predictions": last.predictions if last else None,
            "rows": last.rows if last else None,
            "recompiles": sum(run.graphs for run in runs),
        }


def _summary(samples: Iterable[float]) -> dict[str, float] | None:
    summary = Summary.of(list(samples))
    return None if summary is None else asdict(summary)


def _speedup(baseline: list[Measured], variant: list[Measured]) -> dict[str, Any] | None:
    if not variant:
        return None
    ratio: Ratio = speedup(_parts(baseline), _parts(variant))
    return {**asdict(ratio), "is_difference": ratio.is_difference, "text": str(ratio)}


def _parts(runs: list[Measured]) -> list[tuple[float, ...]]:
    """(rounds, parts) seconds; whole runs where their steps cannot be laid side by side."""
    is_regular = len({len(run.step_s) for run in runs}) == 1
    return [run.parts_s if is_regular else (run.seconds,) for run in runs]


@dataclass
class Report:
    """All of one benchmark.

    Attributes:
        title: what was measured, in one line.
        settings: the sampler's inputs and the number of rounds.
        machine: hardware and versions.
        memory_is: what the memory column holds, in words.
        is_device_memory: whether that is a device's memory in use, and not the process's increase.
        variants: the baseline first, then the candidate, then the ablation, then the rivals.
        difference: where the picture of the amplified difference is.
        status: how far it got.
        reason: why it failed.
        done, total: runs, warm-ups included.
        saved: the files it was saved to, as the host names them.
        notes: what a reader should know.
    """

    title: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    memory_is: str
    is_device_memory: bool
    variants: list[Variant]
    total: int
    done: int = 0
    difference: dict[str, str] | None = None
    status: Status = "running"
    reason: str = ""
    saved: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: see the fields here and in `Variant`."""
        own = {name: value for name, value in vars(self).items() if name != "variants"}
        baseline = self.variants[0]
        variants = [variant.as_dict(baseline, self.is_device_memory) for variant in self.variants]
        report = {"schema": SCHEMA, **own, "variants": variants}
        return {**report, "summary": summary(report)}


# As text


def summary(report: dict[str, Any]) -> str:
    """The candidate's result in one sentence."""
    candidate = next(variant for variant in report["variants"] if variant["role"] == "candidate")
    if candidate["speedup"] is None:
        return "nothing measured yet"
    rounds = min(len(variant["runs"]) for variant in report["variants"][:2])
    parts = [f"candidate: {candidate['speedup']['text']} over {rounds} {'round' if rounds == 1 else 'rounds'}"]
    if candidate["fidelity"] is not None:
        parts.append(_fidelity_words(candidate["fidelity"], candidate["worst"]))
    return ", ".join([*parts, *candidate["problems"]])


def _fidelity_words(fidelity: dict[str, Any], worst: dict[str, Any] | None) -> str:
    if fidelity["is_identical"] and (fidelity["ssim"] is None or fidelity["psnr_db"] is None):
        return "the same picture"
    if fidelity["ssim"] is None:
        text, least = f"latent error {fidelity['latent_error']:.2%}", worst and f"{worst['latent_error']:.2%}"
    else:
        text, least = f"SSIM {fidelity['ssim']:.3f}", worst and f"{worst['ssim']:.3f}"
    return f"{text}, {least} at the worst" if least else text


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a text to paste anywhere."""
    about, machine = report["settings"], report["machine"]
    more = f" and the {about['seeds'] - 1} after it" if about.get("seeds", 1) > 1 else ""
    columns = ["variant", "time (min to max)", "step (min to max)", "speed", *_optional(report), "memory"]
    columns += ["evaluations", "rows", "SSIM", *(["worst SSIM"] if _has_worst(report) else []), "PSNR", "latent error"]
    lines = [
        f"### {report['title']}",
        "",
        f"{report['status']}{': ' + report['reason'] if report['reason'] else ''}; seed {about['seed']}{more}, "
        f"{about['runs']} interleaved rounds after one warm-up of each.",
        "",
        _row(columns),
        "|" + "---|" * len(columns),
        *(_row(_cells(report, variant)) for variant in report["variants"]),
    ]
    lines += ["", f"Memory: {report['memory_is']}.", ""]
    for variant in report["variants"]:
        told = [f"{verdict['title']}: {verdict['text']}" for verdict in variant["verdicts"]]
        told += [f"**{problem}**" for problem in variant["problems"]]
        if variant["warm_up"] is not None:
            told.append(_first_run(variant))
        lines += [f"- {variant['name']}: {'; '.join(told)}"] if told else []
    lines += [f"- {note}" for note in report["notes"]]
    lines += ["", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if value) + "."]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _optional(report: dict[str, Any]) -> list[str]:
    return ["decode"] if any(variant["decode_s"] for variant in report["variants"]) else []


def _has_worst(report: dict[str, Any]) -> bool:
    return any(variant["worst"] for variant in report["variants"])


def _cells(report: dict[str, Any], variant: dict[str, Any]) -> list[str]:
    fidelity = variant["fidelity"] or {}
    is_compared = bool(fidelity) and variant["role"] != "baseline"
    memory = variant["memory_mib"]
    speed = variant["speedup"]
    cells = [variant["name"], seconds(variant["time_s"]), seconds(variant["step_s"]), speed["text"] if speed else "-"]
    cells += [seconds(variant["decode_s"]) for _ in _optional(report)]
    cells += [f"{memory['median']:.0f} MiB" if memory else "-"]
    cells += [str(variant[name]) if variant[name] is not None else "-" for name in ("evaluations", "rows")]
    if not is_compared:
        return [*cells, "-", "-", "-", *(["-"] if _has_worst(report) else [])]
    has_images = fidelity["ssim"] is not None
    psnr = "infinite" if fidelity["psnr_db"] is None else f"{fidelity['psnr_db']:.1f} dB"
    error = "0" if fidelity["is_identical"] else f"{fidelity['latent_error']:.3g}"
    cells += [f"{fidelity['ssim']:.4f}" if has_images else "-"]
    if _has_worst(report):
        worst = variant["worst"] or fidelity
        cells += [f"{worst['ssim']:.4f}" if has_images else "-"]
    return [*cells, psnr if has_images else "-", error]


def _first_run(variant: dict[str, Any]) -> str:
    first = variant["warm_up"]
    text = f"first run {first['seconds']:.2f} s, weights loaded in {first['loading_s']:.2f} s"
    if first["graphs"] or variant["recompiles"]:
        text += f", {first['graphs']} graphs compiled in {first['compile_s']:.1f} s, {variant['recompiles']} after it"
    return text


def seconds(times: dict[str, float] | None) -> str:
    """A summary of seconds as ``2.47 s (2.45 to 2.60)``, in milliseconds below one."""
    if times is None:
        return "-"
    factor, unit = (1.0, "s") if times["median"] >= 1 else (1000.0, "ms")
    median, low, high = (f"{times[name] * factor:.2f}" for name in ("median", "minimum", "maximum"))
    return f"{median} {unit} ({low} to {high})"
