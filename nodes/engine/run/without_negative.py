"""What other nodes put around guidance, where there is no negative: a function is given the positive's prediction in
the negative's place, and by what it does with it, it shows whether it can do without.

No list of nodes, and no look into their code: what a function reads and what comes of it are the same for the host's
nodes and for other packs'. With the two predictions equal there is no guidance, so that whatever reshapes it from them
comes to the positive by itself, and stays. Left out is what

- combines the two in its own way (`sampler_cfg_function`): that is the guidance;
- reads the negative's prompt, though it had guidance made at cfg 1 too to have one: it would evaluate it, as SAG does,
  and what it remembers of it is of an earlier latent;
- evaluates a negative that is not there;
- reads the negative's prediction, evaluates nothing, and comes to something else than the positive all the same: that
  is from memory, as APG's momentum, or from dividing by a difference that is zero.

It is named, and so is what stays but plainly is guidance: it asks which prompts there are, or for the negative's
prediction and the scale of guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ..plan.plan import KEY

OUTERMOST = f"{KEY}.without_negative"
"""The key of its wrapper: the run has one of its own at the same point."""
TOLERANCE = 1e-5
"""Relative error of an evaluation: what rounding makes of a result that is the positive's."""
NEGATIVE = 1
"""Its place in the host's lists; 0 is the positive's."""


class _NoNegativeError(Exception):
    """A function needs the negative."""


class WithoutNegative:
    """One evaluation of the positive alone.

    Args:
        model_options: those of the evaluation.
        is_needed: whether a node on the model has the host evaluate the negative at cfg 1 too.

    Attributes:
        options: to evaluate with.
        left_out: names of the nodes that had nothing to work on.
    """

    def __init__(self, model_options: dict[str, Any], is_needed: bool):
        self.left_out: set[str] = set()
        self._is_needed = is_needed
        self._is_asked = False
        self._evaluated = 0
        self.options = {name: value for name, value in model_options.items() if name != "sampler_cfg_function"}
        self._around_guidance(model_options)
        self._inside_the_model(model_options.get("transformer_options", {}))

    def _around_guidance(self, model_options: dict[str, Any]) -> None:
        if "sampler_cfg_function" in model_options:
            self.left_out.add(name_of(model_options["sampler_cfg_function"]))
        if "sampler_calc_cond_batch_function" in model_options:
            function = model_options["sampler_calc_cond_batch_function"]
            self.options["sampler_calc_cond_batch_function"] = partial(self._evaluate, function)
        for point, call in (("sampler_pre_cfg_function", self._before), ("sampler_post_cfg_function", self._after)):
            self.options[point] = [partial(call, function) for function in model_options.get(point, [])]

    def _inside_the_model(self, transformer_options: dict[str, Any]) -> None:
        wrappers = transformer_options.get("wrappers", {})
        of_kind = {OUTERMOST: [self._calc_cond_batch], **wrappers.get(WrappersMP.CALC_COND_BATCH, {})}
        self.options["transformer_options"] = {
            **transformer_options,
            "wrappers": {**wrappers, WrappersMP.CALC_COND_BATCH: of_kind},
        }
        if self._is_needed:
            self.left_out |= working_on_negative(transformer_options)

    # The host's points, in the order in which it comes to them.

    def _evaluate(self, function: Callable[..., Any], args: dict[str, Any]) -> list[torch.Tensor]:
        """In the place of the host's evaluation."""
        conds = _Slots(args["conds"])
        conds.name = name_of(function)
        return _in_both_slots(function({**args, "conds": conds}))

    def _calc_cond_batch(self, executor: Any, model: Any, conds: Sequence[Any], *args: Any) -> Any:
        """Around the host's evaluation: a wrapper at CALC_COND_BATCH, the first."""
        if isinstance(conds, _Slots):
            if conds.is_looked_at:
                self.left_out.add(conds.name)
            conds = conds.plain()
        if self._is_asked and not any(conds):
            raise _NoNegativeError
        self._evaluated += 1
        predictions = executor(model, conds, *args)
        return _in_both_slots(predictions) if len(conds) == 2 and conds[NEGATIVE] is None else predictions

    def _before(self, function: Callable[..., Any], args: dict[str, Any]) -> list[Any]:
        """A function before guidance, which gets the prompts and their predictions, and returns these."""
        kept = [slot.clone() for slot in args["conds_out"]]
        conds, slots = _Slots(args["conds"]), _Slots(args["conds_out"])
        given = _Arguments({**args, "conds": conds, "conds_out": slots})
        found, has_evaluated = self._ask(function, given)
        if found is None:
            return self._leave_out(function, kept)
        found = found.plain() if isinstance(found, _Slots) else list(found)
        if has_evaluated or not (conds.is_looked_at or slots.is_looked_at):
            return found
        if conds.is_looked_at or "cond_scale" in given.read:
            self.left_out.add(name_of(function))
        if all(map(_is_same, found, kept)):
            return found
        return self._leave_out(function, kept)

    def _after(self, function: Callable[..., Any], args: dict[str, Any]) -> torch.Tensor:
        """A function after guidance, which returns the denoised latent. The cfg++ samplers listen here too."""
        kept = args["denoised"].clone()
        given = _Arguments({**args, "uncond": None}, needed="uncond" if self._is_needed else None)
        found, has_evaluated = self._ask(function, given)
        if found is None:
            return self._leave_out(function, kept)
        if has_evaluated or "uncond_denoised" not in given.read:
            return found
        if "cond_scale" in given.read:
            self.left_out.add(name_of(function))
        return found if _is_same(found, kept) else self._leave_out(function, kept)

    def _ask(self, function: Callable[..., Any], given: _Arguments) -> tuple[Any, bool]:
        """What a function comes to, None if it needs the negative; and whether it evaluated the model itself."""
        evaluated, self._is_asked = self._evaluated, True
        try:
            found = function(given)
        except _NoNegativeError:
            found = None
        finally:
            self._is_asked = False
        return found, self._evaluated > evaluated

    def _leave_out(self, function: Callable[..., Any], kept: Any) -> Any:
        self.left_out.add(name_of(function))
        return kept


def working_on_negative(transformer_options: dict[str, Any]) -> set[str]:
    """Names of the nodes inside the model that work on the negative as it is evaluated, where a node has the host
    evaluate it at cfg 1 too. NAG has no function around guidance: it mixes the two inside attention, where it finds
    both; SAG remembers the negative's attention there."""
    return {name_of(patch) for patch in _patches(transformer_options) if _tells_prompts_apart(patch)}


class _Arguments(dict[str, Any]):
    """What a function gets, as the host gives it, which sees what it reads.

    Args:
        needed: what there is none of, and the function can't do without if it reads it.
    """

    def __init__(self, values: dict[str, Any], needed: str | None = None):
        super().__init__(values)
        self.read: set[str] = set()
        self._needed = needed

    def __getitem__(self, name: str) -> Any:
        if name == self._needed:
            raise _NoNegativeError
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _Slots(list[Any]):
    """One for each prompt, as the host gives them, which sees whether the negative's is looked at.

    Attributes:
        name: of the node whose function has it.
    """

    is_looked_at = False
    name = ""

    def __getitem__(self, key: Any) -> Any:
        self.is_looked_at |= NEGATIVE in range(len(self))[key] if isinstance(key, slice) else key in (NEGATIVE, -1)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self.is_looked_at = True
        return super().__iter__()

    def __contains__(self, value: object) -> bool:
        return value in iter(self)

    def plain(self) -> list[Any]:
        """Without being looked at."""
        return super().__getitem__(slice(None))


def _in_both_slots(predictions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    # A copy: the host's slots are tensors of their own, and functions may write into them.
    return [predictions[0], predictions[0].clone()]


def _is_same(found: torch.Tensor, kept: torch.Tensor) -> bool:
    """Up to rounding; nothing is the same as NaN."""
    difference = torch.linalg.vector_norm((found - kept).float())
    return bool(difference <= TOLERANCE * torch.linalg.vector_norm(kept.float()))


def _patches(transformer_options: dict[str, Any]) -> Iterator[Any]:
    """What nodes put inside the model."""
    for patches in transformer_options.get("patches", {}).values():
        yield from patches
    for replacements in transformer_options.get("patches_replace", {}).values():
        yield from replacements.values()


def _tells_prompts_apart(patch: Any) -> bool:
    """Whether it asks the host which prompts are in a batch: of a patch, only its code says so."""
    function = getattr(patch, "__func__", patch)
    if not inspect.isfunction(function):
        function = type(patch).__call__
    code = getattr(function, "__code__", None)
    return code is not None and "cond_or_uncond" in code.co_consts


def name_of(function: Any) -> str:
    """What a function is of: the class of the node that made it, else its own name."""
    while isinstance(function, partial):
        function = function.func
    if inspect.isfunction(function):
        # The host puts one of its own around a guidance function of three arguments.
        inner = inspect.getclosurevars(function).nonlocals.get("sampler_cfg_function")
        function = function if inner is None else inner
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType):
        return owner.__name__ if isinstance(owner, type) else type(owner).__name__
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    first = name.split(".")[0]
    return first if first != "<lambda>" else str(function.__module__).rpartition(".")[2]
