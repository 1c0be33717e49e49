"""Precision without a host: settings, what it asks of a call, torch's TF32 switches, and what it tells."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from slipstream_pack.nodes.methods import precision
from slipstream_pack.nodes.methods.method import Made, Model, Run, Steps
from slipstream_pack.nodes.methods.precision import Precision, tf32, tf32_switches

MIB = 2**20


class Call:
    """A call of a model on some device; it notes what is asked of it."""

    def __init__(self, device="cpu", dtype=torch.float32, made=None):
        self.device, self.dtype, self.made, self.asked = device, dtype, made or Made(), []

    @contextlib.contextmanager
    def computing_in(self, dtype, layout, only_transformers):
        self.asked.append((dtype, layout, only_transformers) if only_transformers else (dtype, layout))
        yield self.made


def begin(**values):
    return Precision(**values).begin(Run(Model("SD15", "SD1", 4, 12, 25), Steps((1.0, 0.0)), lambda percent: 1.0))


def asked(call, **values):
    begin(**values).apply_model(call, lambda: torch.zeros(1))
    return call.asked[0]


@pytest.fixture(params=[True, False])
def with_bf16(request, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("name", ["compute_dtype", "channels_last", "tf32"])
def test_settings_that_cannot_be_say_what_can(name):
    with pytest.raises(ValueError, match=f"Precision: {name} must be one of auto, .*'fp8'"):
        Precision(**{name: "fp8"})


def test_auto_is_bf16_and_channels_last_on_a_processor_that_has_it(with_bf16):
    expected = (torch.bfloat16, torch.channels_last) if with_bf16 else (torch.float32, None)
    assert asked(Call()) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_leaves_a_gpu_as_it_is(dtype, with_bf16):
    assert asked(Call("cuda", dtype)) == (dtype, None)


def test_auto_leaves_what_somebody_chose_on_a_cpu(with_bf16):
    assert asked(Call(dtype=torch.bfloat16)) == (torch.bfloat16, torch.channels_last)
    assert asked(Call(dtype=torch.float16))[0] == torch.float16


@pytest.mark.parametrize(("name", "layout"), [("on", torch.channels_last), ("off", torch.contiguous_format)])
def test_channels_last_is_asked_for_or_against(name, layout):
    for device in ("cpu", "cuda"):
        assert asked(Call(device), compute_dtype="fp32", channels_last=name) == (torch.float32, layout)


def test_fp16_is_refused_on_a_processor_that_has_none(monkeypatch):
    on = {device: Model("SD15", "SD1", 320, 12, 25, device=device) for device in ("cpu", "cuda")}
    for has_fp16 in (False, True):
        monkeypatch.setattr(precision, "has_fp16", lambda has_fp16=has_fp16: has_fp16)
        Precision("fp16").check(on["cuda"])
        Precision("bf16").check(on["cpu"])
        if has_fp16:
            Precision("fp16").check(on["cpu"])
        else:
            with pytest.raises(
                RuntimeError, match=r"Precision: this processor has no fp16 arithmetic.*Set compute_dtype"
            ):
                Precision("fp16").check(on["cpu"])


# TF32


@pytest.fixture
def switches():
    """They are put back after the test."""
    untouched = tf32_switches()
    yield
    for path, position in untouched.items():
        precision._throw(path, position)
    assert tf32_switches() == untouched


@pytest.mark.parametrize("before", ["highest", "high", "medium", "newer ones alone"])
@pytest.mark.parametrize("cudnn_before", [True, False])
@pytest.mark.parametrize("wanted", ["on", "off"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_switches_are_thrown_for_the_call_and_back_after_it(before, cudnn_before, wanted, fails, switches):
    matmul, seen = torch.backends.cuda.matmul, []
    if before != "newer ones alone":
        torch.set_float32_matmul_precision(before)
    elif hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = cudnn_before

    def run():
        allowed = matmul.fp32_precision == "tf32" if before == "newer ones alone" else matmul.allow_tf32
        seen.append((allowed, torch.backends.cudnn.allow_tf32))
        if fails:
            raise RuntimeError("planted")
        return torch.zeros(1)

    positions = tf32_switches()
    with pytest.raises(RuntimeError, match="planted") if fails else contextlib.nullcontext():
        begin(compute_dtype="fp32", tf32=wanted).apply_model(Call("cuda"), run)
    assert tf32_switches() == positions
    assert seen == [(wanted == "on",) * 2]


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (Call(), {"compute_dtype": "fp32", "tf32": "on"}),
        (Call("cuda", torch.float16), {"tf32": "on"}),
        (Call("cuda"), {"tf32": "auto"}),
    ],
    ids=["CPU", "fp16", "auto"],
)
def test_the_switches_stay_where_they_do_nothing(call, values, monkeypatch):
    monkeypatch.setattr(precision, "_throw", lambda *args: pytest.fail("thrown"))
    begin(**values).apply_model(call, lambda: torch.zeros(1))


def test_two_threads_leave_the_switches_as_they_were():
    """The second goes in while the first is inside, and the first leaves before the second."""
    before, inside, gone = tf32_switches(), threading.Event(), threading.Event()

    def first():
        with tf32(True):
            inside.set()
            second_in.wait(10)
        gone.set()

    second_in = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with tf32(True):
        second_in.set()
        gone.wait(10)
        assert torch.backends.cuda.matmul.allow_tf32
    thread.join()
    assert tf32_switches() == before


# What it tells


def told(call, output=None, **values):
    run = begin(**values)
    run.apply_model(call, lambda: torch.zeros(1) if output is None else output)
    return run.verdict()


def test_a_model_that_was_not_called():
    assert begin().verdict() == ("inert", "changed nothing: the model was not called")


def test_another_dtype_with_what_it_takes(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    made = Made(modules=3, extra_bytes=5 * MIB)
    assert told(Call(made=made), compute_dtype="bf16", channels_last="on") == (
        "active",
        "computed in bf16 in place of fp32 in 1 calls of the model, convolutions channels-last in 1 calls; "
        "5 MiB more memory for its weights in that form, until the run ends",
    )


def test_casting_at_each_use_is_told_with_the_reason():
    made = Made()
    made.left["a GPU is fast at it"] = 7
    state, text = told(Call("cuda", torch.float16, made), compute_dtype="bf16")
    assert state == "active"
    assert text.endswith("; the weights of 7 layers are cast at each use (a GPU is fast at it)")


def test_what_changed_nothing_says_so():
    assert told(Call(), compute_dtype="fp32", channels_last="off") == (
        "inert",
        "changed nothing: the model computes in fp32, as without this node",
    )


def test_a_processor_without_bf16_is_told(with_bf16):
    _, text = told(Call(), compute_dtype="bf16")
    assert ("this processor has no bf16 arithmetic, so fp32 may be faster" in text) != with_bf16


def test_auto_that_finds_no_bf16_says_so(with_bf16):
    state, text = told(Call())
    note = "; this processor has no bf16 arithmetic, which is what auto takes where it is faster"
    assert state == ("active" if with_bf16 else "inert")
    assert text.endswith(note) != with_bf16
    assert note not in told(Call(), compute_dtype="fp32")[1]
    assert note not in told(Call("cuda"))[1]


@pytest.mark.parametrize(
    ("call", "values", "why"),
    [
        (Call(), {"compute_dtype": "fp32"}, "tf32 is for NVIDIA GPUs: not used"),
        (Call("cuda", torch.float16), {}, "tf32 is for fp32, not fp16: not used"),
    ],
)
def test_tf32_that_does_nothing_says_why(call, values, why):
    state, text = told(call, tf32="on", **values)
    assert state == "inert"
    assert text.endswith(why)


def test_tf32_alone_is_told():
    assert told(Call("cuda"), tf32="off") == ("active", "TF32 off in 1 calls")


def test_overflow_in_fp16_names_the_node_and_what_to_set():
    overflown = torch.tensor([1.0, float("nan")])
    with pytest.raises(
        RuntimeError, match=r"Precision: .*fp16, which ends at 65504. Set compute_dtype to bf16 or fp32"
    ):
        told(Call("cuda"), overflown, compute_dtype="fp16")
    # It is not this node's doing where the host computes in it anyway, or where the range is fp32's.
    told(Call("cuda", torch.float16), overflown, compute_dtype="fp16")
    told(Call("cuda"), overflown, compute_dtype="bf16")


def test_the_transformers_alone():
    assert asked(Call(), compute_dtype="bf16", scope="transformers") == (torch.bfloat16, None, True)
    run = begin(compute_dtype="bf16", scope="transformers")
    run.apply_model(Call(), lambda: torch.zeros(1))
    assert "computed in bf16 in place of fp32 in 1 calls of the transformers" in run.verdict()[1]


def test_the_transformers_alone_are_for_unets_on_processors():
    settings = Precision(scope="transformers")
    settings.check(Model("SD15", "SD1", 320, 12, 25))
    with pytest.raises(RuntimeError, match="scope transformers is for processors, but this model runs on cuda"):
        settings.check(Model("SD15", "SD1", 320, 12, 25, device="cuda"))
    with pytest.raises(RuntimeError, match="set scope to model"):
        settings.check(Model("Flux", None, None, 0, 0))
