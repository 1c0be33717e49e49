"""Functions that are compiled and counted, each with a cache of dynamo's own.

Dynamo keeps what it compiled with the code object of a function, at most so many variants of each,
and silently goes on without when there are more. So each kind of block gets a copy of its function
with a code object of its own: its variants are its own, and go when it goes.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from .backends import Backend, Graph, first_line
from .settings import Settings
from .tally import Tally

VARIANTS = 64
"""Variants of one function, as sizes, batches and prompt lengths make them, before all are made anew."""

STEADY_CALLS = 3
"""Calls at full speed that make a ratio worth telling."""
SCATTER = 1.2
"""How far their median may lie above the fastest."""

Announce = Callable[[int, float], None]


class Compiler:
    """What a backend made for one module, and how it is called.

    It outlives runs, which come one at a time for each module: `begin` says whose run it is.

    Args:
        settings: the settings.
        backend: the backend that was found for them.
    """

    def __init__(self, settings: Settings, backend: Backend):
        self.settings = settings
        self.backend = backend
        self.dynamic = "off" if backend.is_static else settings.dynamic
        self.tally = Tally(backend.name, "call")
        self.announce: Announce | None = None
        # Counted up alone: a call that adds to it compiled something.
        self.graphs = 0
        self._graphs_of: Counter[Hashable] = Counter()
        self._used: set[Hashable] = set()
        self._functions: dict[Hashable, Graph] = {}
        self._seen: set[tuple[tuple[str, Any], ...]] = set()
        # By kind of step: a shape is told apart from the last one of its own kind.
        self._last: dict[Any, Mapping[str, Any]] = {}
        self._fingerprint: Hashable = None
        self._timed: Mapping[str, Any] | None = None

    def begin(self, tally: Tally, announce: Announce | None) -> None:
        """A run begins, or goes on: count into this tally, and tell while something is compiled."""
        self.announce = announce
        if tally is not self.tally:
            self.tally = tally
            self._used.clear()
            self._timed = None
            self._eager_s: list[float] = []
            self._steady_s: list[float] = []
            self._tell_state()

    def end(self) -> None:
        """The run is over: nothing of it is held, or it would hold what keeps this."""
        self.announce = None

    def function(self, key: Hashable, function: Callable[..., Any]) -> Graph:
        """A function compiled by dynamo and the backend, one for each key."""
        self._used.add(key)
        compiled = self._functions.get(key)
        if compiled is None:
            compiled = self._functions[key] = self._compiled(key, function)
        return compiled

    def _compiled(self, key: Hashable, function: Callable[..., Any]) -> Graph:
        # A name of its own too: by it dynamo remembers which sizes have changed, and each kind has its own.
        name = f"{function.__name__}_{zlib.crc32(repr(key).encode()):08x}"
        code = function.__code__.replace(co_name=name)
        fresh = FunctionType(code, function.__globals__, name, None, function.__closure__)
        compiled = torch.compile(
            fresh,
            backend=partial(self._compile_graph, key),
            dynamic={"auto": None, "on": True, "off": False}[self.dynamic],
            fullgraph=self.settings.fullgraph,
        )

        def call(*args: Any) -> Any:
            try:
                return compiled(*args)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # Else every further shape would run without a graph.
                self.tally.notes[f"more than {VARIANTS} variants of one graph: all were made anew"] = None
                self._graphs_of[key] = 0
                self._functions[key] = self._compiled(key, function)
                return self._functions[key](*args)

        return call

    def module(self, key: Hashable, make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> Graph:
        """A module compiled by the backend as it is, one for each key and set of shapes."""
        key = (key, tuple((tuple(value.shape), value.dtype, value.device) for value in inputs))
        self._used.add(key)
        compiled = self._functions.get(key)
        if compiled is None:
            compiled = self._functions[key] = self.backend.compile_module(make(), inputs, self.settings)
            self._count_graph(key)
        return compiled

    def _compile_graph(self, key: Hashable, graph: torch.fx.GraphModule, inputs: list[Any]) -> Graph:
        compiled = self.backend.compile_graph(graph, inputs, self.settings, self.tally)
        self._count_graph(key)
        return compiled

    def _count_graph(self, key: Hashable) -> None:
        self.graphs += 1
        self._graphs_of[key] += 1
        self.tally.new_graphs += 1

    def _tell_state(self) -> None:
        self.tally.graphs = sum(self._graphs_of[key] for key in self._used)
        self.tally.ratio = ratio(self._eager_s, self._steady_s)

    def follow(self, module: nn.Module) -> None:
        """Before a run: forget all, if a weight was changed that the backend does not follow."""
        if self.backend.shares_graphs(self.settings):
            return
        found = fingerprint(module)
        if self._fingerprint not in (None, found):
            self._forget()
            self.tally.notes["all was compiled anew, since the weights changed"] = None
        self._fingerprint = found

    def _forget(self) -> None:
        self._functions.clear()
        self._graphs_of.clear()
        self._seen.clear()
        self._last.clear()

    @property
    def is_untimed(self) -> bool:
        """Whether the next call should be timed without graphs first: before anything is compiled."""
        return not self._seen

    def timed(self, shape: Mapping[str, Any], seconds: list[float]) -> None:
        """What calls of this shape took without graphs."""
        self._timed, self._eager_s = shape, seconds

    def is_timing(self, shape: Mapping[str, Any]) -> bool:
        """Whether calls of this shape were timed without graphs, and few so far with them."""
        return shape == self._timed and len(self._steady_s) < 2 * STEADY_CALLS

    def steady(self, seconds: float) -> None:
        """What such a call took with its graph, made before."""
        self._steady_s.append(seconds)

    def call(self, shape: Mapping[str, Any], run: Callable[[], Any], wait: Callable[[], None] | None) -> Any:
        """Run something that calls compiled functions.

        Args:
            shape: what graphs may depend on, by the names a user knows: ``{"resolution": "512x512", ...}``. `step`
                among them is the kind of step.
            run: calls the functions.
            wait: waits for the device; None if this call is not to be timed.

        Raises:
            RuntimeError: the backend failed.
        """
        key = tuple(shape.items())
        is_new = key not in self._seen
        is_timed = wait is not None and shape == self._timed
        if wait is not None and is_timed:
            wait()
        graphs, began = self.graphs, time.perf_counter()
        before = _counts()
        try:
            with self._announcing() if is_new else contextlib.nullcontext(), _configured(self.settings, self.dynamic):
                output = run()
        except Exception as error:
            if self._is_of_compiling(error, is_new):
                self._forget()
                could_be_blocks = self.settings.has_blocks and self.settings.scope == "model"
                instead = "Set scope to blocks, choose" if could_be_blocks else "Choose"
                raise RuntimeError(
                    f"{self.settings.title}: {self.backend.name} could not compile this model "
                    f"({first_line(getattr(error, 'inner_exception', error))}). {instead} another backend, or take the "
                    "node out."
                ) from error
            raise
        self.tally.calls += 1
        if self.graphs > graphs:
            self._record(shape, is_new, self.graphs - graphs, before, began)
        elif wait is not None and is_timed:
            wait()
            self._steady_s.append(time.perf_counter() - began)
        self._seen.add(key)
        # Last of all, in its order too: it is what a new kind is compared with.
        self._last.pop(shape.get("step"), None)
        self._last[shape.get("step")] = shape
        self._tell_state()
        return output

    def _record(
        self, shape: Mapping[str, Any], is_new: bool, made: int, before: tuple[int, Mapping[str, int]], began: float
    ) -> None:
        self.tally.compile_s += time.perf_counter() - began
        hits, breaks = _counts()
        self.tally.cached += hits - before[0]
        for reason, number in breaks.items():
            new = number - before[1].get(reason, 0)
            if new > 0:
                self.tally.breaks[reason.splitlines()[0].strip()] += new
        if self._last:
            last = self._last.get(shape.get("step")) or next(reversed(self._last.values()))
            # A shape that graphs were made for before needs others for another reason.
            changed = [f"{name} {last[name]} to {value}" for name, value in shape.items()
                       if is_new and last.get(name, value) != value]  # fmt: skip
            self.tally.recompiled[", ".join(changed) or _recompile_reason()] += made

    def _is_of_compiling(self, error: Exception, is_first: bool) -> bool:
        """Whether an error comes from compiling, and not from what was compiled."""
        if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
            return False
        # Backends that take modules trace them in the first call.
        is_traced = self.backend.takes_modules and is_first
        is_dynamos = isinstance(error, AssertionError) and _raised_in(error).startswith("torch._dynamo.")
        return is_traced or is_dynamos or isinstance(error, torch._dynamo.exc.TorchDynamoException)

    @contextlib.contextmanager
    def _announcing(self) -> Iterator[None]:
        """Tell each second how long it has been, until it is over."""
        announce = self.announce
        if announce is None:
            yield
            return
        over, began, graphs = threading.Event(), time.perf_counter(), self.graphs

        def tell() -> None:
            while not over.wait(1.0):
                announce(self.graphs - graphs, time.perf_counter() - began)

        thread = threading.Thread(target=tell, name="slipstream-compiling", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


def ratio(without: list[float], steady: list[float]) -> float | None:
    """How many times as fast calls are as those without graphs; None if there are too few, or they scatter too much."""
    if min(len(without), len(steady)) < STEADY_CALLS:
        return None
    if any(statistics.median(seconds) > SCATTER * min(seconds) for seconds in (without, steady)):
        return None
    return statistics.median(without) / statistics.median(steady)


_inside = 0
_patches = contextlib.ExitStack()
_entering = threading.Lock()


@contextlib.contextmanager
def _configured(settings: Settings, dynamic: str) -> Iterator[None]:
    """Dynamo's options, as our functions need them, for as long as one of them is called: on several GPUs, one run
    calls them in several threads."""
    global _inside
    wanted = {
        "recompile_limit": VARIANTS,
        "accumulated_recompile_limit": 4 * VARIANTS,
        "fail_on_recompile_limit_hit": True,
        # Modules inlined, their weights are inputs of the graph: one graph serves all blocks of a kind.
        "inline_inbuilt_nn_modules": True,
        # A number that each block of a kind has of its own, as Wan VACE's, would make a graph for each of them.
        "allow_unspec_int_on_nn_module": True,
        "suppress_errors": False,
    }
    known = {name: value for name, value in wanted.items() if hasattr(dynamo_config, name)}
    dynamo: Any = dynamo_config
    shapes: Any = torch.fx.experimental._config
    with _entering:
        if not _inside:
            _patches.enter_context(dynamo.patch(known))
            _patches.enter_context(shapes.patch(use_duck_shape=dynamic == "off"))
        _inside += 1
    try:
        if settings.records_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        yield
    finally:
        with _entering:
            _inside -= 1
            if not _inside:
                _patches.close()


def _counts() -> tuple[int, dict[str, int]]:
    """Of the whole process: inductor's disk cache hits, and graph breaks by reason."""
    return counters["inductor"]["fxgraph_cache_hit"], dict(counters["graph_break"])


def _recompile_reason() -> str:
    """Dynamo's own reason for the last compilation, short."""
    metrics = torch._dynamo.utils.get_compilation_metrics()
    reason = metrics[-1].recompile_reason if metrics else None
    if not reason:
        return "blocks of another kind"
    # The second is what guards of tensor subclasses, such as torchao's weights, are called.
    if "_parameters[" in reason or "___check_metadata_" in reason:
        return "other weights were put in the place of some"
    if "___dict_contains('forward'" in reason:
        return "another node took its code off some layers"
    return reason.splitlines()[0].split("; ")[0].strip()[:120]


def fingerprint(module: nn.Module) -> Hashable:
    """What tells whether a module is still the same: its parts' classes, which tensors its weights, where, and their
    sums.

    Classes, since another node may put one activation in the place of another. Sums, since edits in place leave
    everything else as it is, and tensors made in inference mode count no versions.
    """
    weights = list(module.parameters())
    sums = torch.stack([weight.detach().double().sum() for weight in weights]).tolist() if weights else []
    parts = tuple(map(type, module.modules()))
    return parts, *((id(weight), weight.data_ptr(), total) for weight, total in zip(weights, sums, strict=True))
