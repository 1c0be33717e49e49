"""What Slipstream holds and gives on a GPU, in one command of four minutes.

    ./slipstream gpu                        # or, without a network, by a Python that has what ComfyUI needs:
    python benchmarks/gpu.py                # ComfyUI is found at COMFYUI_PATH, or as the tests find it
    python benchmarks/gpu.py --only sdxl    # one part again
    python benchmarks/gpu.py --tiny         # all of it in small, also on a CPU: whether it runs, not how fast
    ./slipstream gpu --pack FOLDER          # what a machine without a network needs, in one folder

No network, no server: ComfyUI in process. The parts run one after the other in a process of their own, the most
important first, and each figure is written as soon as it is known. A part that fails, hangs past its share of the time
or runs out of memory costs that part only: what hangs or dies is ended, and the next part gets a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUTPUT = HERE / "results" / "gpu"
START_S = 15.0
"""What a process needs until its first part begins, at most on a slow disk twice that."""
GRACE_S = 3.0
"""How long a part may go on after its time, before it is ended."""


@dataclass
class Bench:
    """What a part gets.

    Attributes:
        is_tiny: small models and few steps.
        until: on the clock of `time.monotonic`, when it must be through.
        events: where what is known goes, a line each.
    """

    is_tiny: bool
    until: float
    events: TextIO
    part: str = ""

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def keep(self, name: str, figure: Any) -> None:
        """A figure, or several under names; the last one under a name counts."""
        self._tell("figure", name=name, figure=figure)

    def leave_out(self, name: str, why: str) -> None:
        """Something that is not measured here."""
        self._tell("left out", name=name, why=why)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """What fails in here is kept as failed, and the part goes on."""
        try:
            yield
        except Exception as error:
            self._tell("failed", name=name, why=told(error))

    def _tell(self, kind: str, **more: Any) -> None:
        print(json.dumps({"event": kind, **more}, default=str), file=self.events, flush=True)


def told(error: BaseException) -> str:
    """An error in one line, with the place where it was raised."""
    lines = str(error).strip().splitlines() or ["no message"]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0]}{place}"


# The process that runs the parts


def load_parts(path: Path) -> Any:
    """The module that has the parts."""
    spec = importlib.util.spec_from_file_location("gpu_parts", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gpu_parts"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def work(arguments: argparse.Namespace) -> None:
    """Run the parts that come in, a line each, until there are no more."""
    # What packages print must not come between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        parts = load_parts(arguments.parts)
        parts.prepare(arguments.tiny)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"event": "unable", "why": told(error)}), file=events, flush=True)
        return
    print(json.dumps({"event": "ready", "about": parts.about()}), file=events, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        bench = Bench(arguments.tiny, time.monotonic() + order["seconds"], events, order["part"])
        end: dict[str, Any] = {"event": "end", "status": "done"}
        try:
            getattr(parts, order["part"])(bench)
        except Exception as error:
            traceback.print_exc()
            end = {"event": "end", "status": "failed", "why": told(error)}
        with contextlib.suppress(Exception):
            parts.clean_up()
        print(json.dumps(end), file=events, flush=True)


@dataclass
class Worker:
    """That process, as the one that watches over it sees it."""

    process: subprocess.Popen[str]
    events: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)

    @classmethod
    def start(cls, arguments: argparse.Namespace, log: TextIO) -> Worker:
        command = [sys.executable, str(Path(__file__)), "--worker", "--parts", str(arguments.parts)]
        command += ["--tiny"] * arguments.tiny
        command += ["--packages", str(arguments.packages)] if arguments.packages else []
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        worker = cls(process)
        threading.Thread(target=worker._read, daemon=True).start()
        return worker

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.events.put({"event": "died", "code": self.process.wait()})

    def next(self, until: float) -> dict[str, Any]:
        """The next event; one of ours if there is none in time."""
        try:
            return self.events.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return {"event": "late"}

    def order(self, part: Any, seconds: float) -> None:
        assert self.process.stdin is not None
        # One that has just died says so itself.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"part": part.name, "seconds": seconds}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """End it, with all that it started, such as a compiler's own processes."""
        kill = getattr(os, "killpg", None)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if kill is not None:
                kill(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()


# What watches over it


class Report:
    """What is known so far, written as it comes.

    Args:
        folder: gets the figures and the page.
        parts: all there are, in their order.
        settings: those of this run.
    """

    def __init__(self, folder: Path, parts: Sequence[Any], settings: dict[str, Any]):
        self.folder = folder
        self.parts = parts
        self.data: dict[str, Any] = {"settings": settings, "about": {}, "parts": {}}
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            # Of an earlier run the parts that are not run again.
            self.data["parts"] = json.loads(self.figures.read_text(encoding="utf-8"))["parts"]

    @property
    def figures(self) -> Path:
        return self.folder / "figures.json"

    def begin(self, part: Any) -> dict[str, Any]:
        self.data["parts"][part.name] = {"status": "begun", "figures": {}, "failed": {}, "left_out": {}}
        return dict(self.data["parts"][part.name])

    def note(self, part: Any, event: dict[str, Any]) -> None:
        """What a part tells while it runs."""
        entry = self.data["parts"][part.name]
        if event["event"] == "figure":
            entry["figures"][event["name"]] = event["figure"]
        elif event["event"] == "failed":
            entry["failed"][event["name"]] = event["why"]
        else:
            entry["left_out"][event["name"]] = event["why"]
        self.save()

    def close(self, part: Any, status: str, seconds: float, why: str = "") -> None:
        self.data["parts"][part.name] |= {"status": status, "seconds": round(seconds, 1), "why": why}
        self.save()
        say(f"{part.name}: {status}{f' ({why})' if why else ''}, {seconds:.0f} s")

    def save(self) -> None:
        self.figures.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(f"gpu: {text}", file=sys.stderr, flush=True)


def run(parts: Sequence[Any], arguments: argparse.Namespace, report: Report) -> None:
    """Run parts one after the other within the minutes."""
    end = time.monotonic() + 60 * arguments.minutes
    worker: Worker | None = None
    status = why = ""
    with (report.folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            for number, part in enumerate(parts):
                report.begin(part)
                if status == "unable":
                    report.close(part, "left out", 0.0, why)
                    continue
                starting = START_S if worker is None else 0.0
                left = end - time.monotonic() - starting - GRACE_S
                if left < part.seconds / 4:
                    report.close(
                        part, "left out", 0.0, f"{max(0, left):.0f} s were left, and it needs {part.seconds:.0f}"
                    )
                    continue
                # What earlier parts did not need is its own too.
                later = sum(other.seconds for other in parts[number + 1 :])
                seconds = min(left, max(part.seconds, left - later))
                began = time.monotonic()
                worker = worker or Worker.start(arguments, log)
                worker.order(part, seconds)
                status, why = watch(worker, part, began + 2 * starting + seconds + GRACE_S, report)
                report.close(part, status, time.monotonic() - began, why)
                if status in ("hung", "died", "unable"):
                    worker.end()
                    worker = None
        finally:
            if worker is not None:
                worker.end()


def watch(worker: Worker, part: Any, until: float, report: Report) -> tuple[str, str]:
    """Note what a part tells, until it ends one way or another: how, and why."""
    while True:
        event = worker.next(until)
        if event["event"] == "ready":
            report.data["about"] = event["about"]
        elif event["event"] == "end":
            return event["status"], event.get("why", "")
        elif event["event"] == "unable":
            return "unable", f"nothing could begin: {event['why']}"
        elif event["event"] == "died":
            return "died", f"the process ended with code {event['code']}: the end of log.txt says why"
        elif event["event"] == "late":
            return "hung", "it went on past its share of the time"
        else:
            report.note(part, event)


def pack(arguments: argparse.Namespace) -> None:
    """Make the folder for a machine without a network."""
    sys.path[:0] = [str(HERE), str(ROOT / "tests")]
    from gpu_pack import pack
    from loading import find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        raise SystemExit("gpu: no ComfyUI was found. Set COMFYUI_PATH to its folder.")
    try:
        pack(arguments.pack, comfyui, arguments.python)
    except RuntimeError as error:
        raise SystemExit(f"gpu: {error}") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `./slipstream gpu` takes too."""
    parser.add_argument("--minutes", type=float, default=4.0, help="all of it takes no longer (4)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone; what is known of others stays")
    parser.add_argument("--tiny", action="store_true", help="small models, also on a CPU")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where figures and page go (benchmarks/results/gpu)"
    )
    parser.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="run nothing: make this folder, for a machine without a network"
    )
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of Python on that machine (3.12)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--env", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=Path, default=HERE / "gpu_parts.py", help=argparse.SUPPRESS)
    parser.add_argument("--packages", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.packages:
        # At the end: what the machine has itself comes first.
        sys.path.append(str(arguments.packages))
    if arguments.worker:
        work(arguments)
        return
    if arguments.pack:
        pack(arguments)
        return
    # As an exception, so that the worker is ended too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    everything = load_parts(arguments.parts)
    parts = [part for part in everything.PARTS if part.name in (arguments.only or [part.name])]
    unknown = set(arguments.only or ()) - {part.name for part in parts}
    if unknown:
        names = ", ".join(part.name for part in everything.PARTS)
        raise SystemExit(f"gpu: --only takes {names}, but got {', '.join(sorted(unknown))}.")
    settings = {"minutes": arguments.minutes, "tiny": arguments.tiny}
    report = Report(arguments.output or OUTPUT, everything.PARTS, settings)
    run(parts, arguments, report)
    page = everything.page(report.data)
    (report.folder / "README.md").write_text(page, encoding="utf-8")
    print(page)
    if any(entry["status"] == "unable" for entry in report.data["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
