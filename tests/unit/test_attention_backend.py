"""Attention Backend without a host: each kernel against float64, what it falls back from, and what it tells."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from slipstream_pack.nodes.methods import attention_backend
from slipstream_pack.nodes.methods.attention_backend import (
    BACKENDS,
    EIGHT_BITS,
    KERNELS,
    MODULES,
    AttentionBackend,
    NoKernelError,
    attend,
    lacking,
)
from slipstream_pack.nodes.methods.method import Attention, Evaluation, Made, Model, Run, Steps
from torch.nn.attention import _cur_sdpa_kernel_backends as enabled

CPU_KERNELS = ("flash", "math")
"""Those that PyTorch has on a CPU."""
MIB = 2**20


def tensor(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention(
    heads=2, width=8, tokens=12, context=None, mask=None, is_split=False, keeps_split=False, scale=None,
    kv_heads=None, dtype=torch.float32, host_name="sub_quad", batch=2,
):  # fmt: skip
    def made(count, length, seed):
        whole = tensor(batch, length, count * width, dtype=dtype, seed=seed)
        return whole.unflatten(-1, (count, width)).transpose(1, 2) if is_split else whole

    context = context or tokens
    q, k, v = (
        made(heads, tokens, 1),
        *(made(kv_heads or heads, context, seed) for seed in (2, 3)),
    )
    host = lambda: torch.full((1,), 7.0)  # noqa: E731
    return Attention(q, k, v, heads, mask, is_split, keeps_split, scale, kv_heads is not None, host_name, host)


def in_float64(call):
    """softmax(q k' / sqrt(width) + mask) v, by hand."""
    width = call.q.shape[-1] if call.is_split else call.q.shape[-1] // call.heads
    q, k, v = (
        t.double() if call.is_split else t.double().unflatten(-1, (-1, width)).transpose(1, 2)
        for t in (call.q, call.k, call.v)
    )
    k, v = (t.repeat_interleave(call.heads // t.shape[1], 1) for t in (k, v))
    products = torch.einsum("bhqc,bhkc->bhqk", q, k) * (call.scale or width**-0.5)
    if call.mask is not None:
        mask = call.mask if call.mask.ndim != 3 else call.mask[:, None]
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask.double()
    out = torch.einsum("bhqk,bhkc->bhqc", products.softmax(-1), v)
    return out if call.keeps_split else out.transpose(1, 2).flatten(2)


MASKS = {
    "none": None,
    "bool": (tensor(12, 12) > 0) | torch.eye(12, dtype=torch.bool),
    "2-D": tensor(12, 12),
    "3-D": tensor(2, 12, 12),
    "4-D": tensor(2, 2, 12, 12),
}

# max abs error of outputs near 1, against float64 on the same rounded inputs
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("kernel", [*CPU_KERNELS, None])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])
def test_a_mask_may_be_of_another_dtype(dtype, mask_dtype, kernel):
    call = attention(mask=tensor(12, 12).to(mask_dtype), dtype=dtype)
    out = attend(call, None if kernel is None else KERNELS[kernel])
    assert (out.double() - in_float64(call)).abs().max() < max(BOUND[dtype], BOUND[torch.bfloat16])


@pytest.mark.parametrize("kernel", [*CPU_KERNELS, None])
def test_heads_are_cut_by_the_batch_of_q(kernel):
    """As the host does: q in tiles, and each attends to its part of k and v."""
    whole = attention(batch=4, tokens=6)
    k, v = (t.reshape(2, 12, -1) for t in (whole.k, whole.v))
    call = dataclasses.replace(whole, k=k, v=v)
    out = attend(call, None if kernel is None else KERNELS[kernel])
    assert torch.equal(out, attend(whole, None if kernel is None else KERNELS[kernel]))


@pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("kernel", [*CPU_KERNELS, None])
def test_each_kernel_against_float64(kernel, mask, dtype):
    mask = MASKS[mask]
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    call = attention(mask=mask, dtype=dtype)
    out = attend(call, None if kernel is None else KERNELS[kernel])
    assert out.dtype == dtype
    assert (out.double() - in_float64(call)).abs().max() < BOUND[dtype]


@pytest.mark.parametrize(
    "values",
    [
        {"is_split": True},
        {"is_split": True, "keeps_split": True},
        {"keeps_split": True},
        {"context": 7},
        {"scale": 0.5},
        {"heads": 4, "kv_heads": 2},
        {"heads": 4, "kv_heads": 2, "is_split": True},
        {"width": 40, "heads": 8, "tokens": 64},
    ],
    ids=str,
)
def test_every_way_in_which_the_host_calls_it(values):
    call = attention(**values)
    expected = in_float64(call)
    out = attend(call, None)
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() < BOUND[torch.float32]


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_a_kernel_that_is_not_there_leaves_the_choice_of_kernels_as_it_was(kernel):
    before = enabled(with_priority=True)
    with pytest.raises(NoKernelError):
        attend(attention(), KERNELS[kernel])
    assert enabled(with_priority=True) == before
    attend(attention(), KERNELS["math"])
    assert enabled(with_priority=True) == before


def test_other_errors_are_not_taken_for_a_kernel_that_is_not_there(monkeypatch):
    before = enabled()

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        attend(attention(), KERNELS["math"])
    assert enabled() == before


def test_threads_leave_the_choice_of_kernels_as_it_was():
    before, call = enabled(), attention(tokens=256, heads=8, width=40)
    threads = [threading.Thread(target=lambda: [attend(call, KERNELS["math"]) for _ in range(20)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert enabled() == before


# A run


class Call:
    attention_before = None
    own_attentions = 0
    is_one_of_several = False
    has_self_attention_patches = False

    def __init__(self, made=None):
        self.attend, self.made, self.is_fused = None, made or Made(), False

    @contextlib.contextmanager
    def attending(self, attend):
        self.attend = attend
        yield

    @contextlib.contextmanager
    def fusing_qkv(self):
        self.is_fused = True
        yield self.made


def begin(backend="auto", fuse_qkv=False):
    model = Model("SD15", "SD1", 4, 12, 25)
    return AttentionBackend(backend, fuse_qkv).begin(Run(model, Steps((1.0, 0.0)), lambda percent: 1.0))


def run_with(run, *attentions, call=None):
    call = call or Call()

    def model():
        return [call.attend(each) for each in attentions]

    return run.apply_model(call, model)


def test_settings():
    with pytest.raises(
        ValueError, match="backend must be one of auto, flash, efficient, cudnn, math, host, sage, comfy"
    ):
        AttentionBackend("sage2")
    assert [AttentionBackend(name).is_exact for name in ("auto", "math", *EIGHT_BITS)] == [True, True, False, False]
    assert AttentionBackend("host").off() == "backend is host, and fuse_qkv is off"
    assert not any(AttentionBackend(name).off() for name in BACKENDS if name != "host")
    assert AttentionBackend("host", True).off() is None
    flux = Model("Flux", None, None, 0, 0)
    AttentionBackend("flash").check(flux)
    with pytest.raises(RuntimeError, match=r"with fuse_qkv.*Flux.*Turn fuse_qkv off"):
        AttentionBackend("flash", True).check(flux)


def test_auto_takes_the_place_of_what_is_no_kernel_alone():
    run = begin()
    slow, fast = attention(host_name="split"), attention(host_name="pytorch")
    first, second = run_with(run, slow, fast)
    assert torch.equal(first, attend(slow, None))
    assert torch.equal(second, fast.host())
    assert run.verdict() == (
        "active",
        "PyTorch's choice of kernel in 1 of 2 attention calls; the host's own (pytorch) in 1, which is a kernel "
        "already",
    )


def test_a_kernel_that_is_not_there_falls_back_once_counted_and_told(monkeypatch):
    run, tried, real = begin("cudnn"), [], attention_backend.attend
    monkeypatch.setattr(attention_backend, "attend", lambda *args: tried.append(1) or real(*args))
    call = attention()
    assert all(torch.equal(out, call.host()) for out in run_with(run, call, call, call))
    assert len(tried) == 1, "it is asked for once for each shape"
    run_with(run, attention(mask=MASKS["bool"]))
    assert run.verdict() == (
        "inert",
        "the cudnn kernel in 0 of 4 attention calls; "
        "the host's own (sub_quad) in 3, since cudnn does not serve float32 heads 8 wide on this cpu device; "
        "the host's own (sub_quad) in 1, since cudnn does not serve float32 heads 8 wide with a mask on this cpu "
        "device",
    )


def test_where_it_serves_it_runs(monkeypatch):
    run = begin("math")
    call = attention(host_name="pytorch")
    assert torch.equal(run_with(run, call)[0], attend(call, KERNELS["math"]))
    assert run.verdict() == ("active", "the math kernel in 1 of 1 attention calls")


def test_devices_and_batches_that_no_kernel_can_be_chosen_for(monkeypatch):
    monkeypatch.setattr(attention_backend, "CHOOSING", ("cuda",))
    run = begin("math")
    run_with(run, attention())
    assert "since on cpu PyTorch lets none be chosen" in run.verdict()[1]
    monkeypatch.setattr(attention_backend, "MAX_BATCH", 1)
    run = begin()
    run_with(run, attention())
    assert "since auto takes no batches above 1" in run.verdict()[1]


def test_no_kernel_is_forced_while_other_devices_compute():
    """The choice is the process's: what another thread computes meanwhile would have to do with it."""
    for backend, is_forced in (("math", True), ("auto", False)):
        run, call = begin(backend), Call()
        call.is_one_of_several = True
        run_with(run, attention(), call=call)
        assert ("several devices compute at once" in run.verdict()[1]) == is_forced


def test_nothing_to_do_is_told_with_the_reason():
    assert begin().verdict() == ("inert", "changed nothing: the model was not called")
    run = begin()
    run_with(run)
    state, text = run.verdict()
    assert state == "inert"
    assert text.startswith("this model asks for no attention that can be overridden: ComfyUI's flags, such as ")
    run, call = begin(), Call()
    call.attention_before = "sage"
    run_with(run, call=call)
    assert run.verdict() == ("inert", "another node chose attention before (sage) and leaves nothing to this one")


def test_fusing_is_told_with_what_it_takes_and_what_was_left():
    made = Made(modules=15, extra_bytes=3 * MIB)
    made.left["another node replaced their code"] = 1
    run, call = begin("host", True), Call(made)
    call.has_self_attention_patches = True
    run.apply_model(call, lambda: None)
    run.apply_model(call, lambda: None)
    assert call.is_fused
    assert call.attend is None
    assert run.verdict() == (
        "active",
        "one projection for q, k and v in 15 of 16 self-attentions, 3.0 MiB more memory until the run ends; "
        "1 keep three: another node replaced their code; where another node changes what self-attention is given, it "
        "had three",
    )


# Eight bits


def as_the_packages(serve):
    """Stand-ins for the two packages, each with its own function's arguments. `serve` gets q, k, v, mask and scale."""
    sage, kitchen = (ModuleType(name) for name in MODULES.values())

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
        assert (tensor_layout, is_causal, smooth_k, kwargs) == ("HND", False, False, {})
        return serve(q, k, v, None, sm_scale)

    sage.sageattn = sageattn
    kitchen.int8_attention = lambda q, k, v, *, scale=None, attn_mask=None: serve(q, k, v, attn_mask, scale)
    kitchen.int8_attention_is_available = lambda: True
    return {MODULES["sage"]: sage, MODULES["comfy_kitchen_int8"]: kitchen}


def exact(q, k, v, mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


@pytest.fixture
def packages(monkeypatch):
    def install(serve=exact):
        for name, module in as_the_packages(serve).items():
            monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.mark.parametrize("backend", EIGHT_BITS)
@pytest.mark.parametrize(
    "values",
    [{}, {"is_split": True, "keeps_split": True}, {"context": 7}, {"scale": 0.5}, {"heads": 4, "kv_heads": 2}],
    ids=str,
)
def test_the_packages_get_what_they_expect(backend, values, packages):
    packages()
    call = attention(**values)
    keys = call.k.clone()
    assert (attend(call, backend).double() - in_float64(call)).abs().max() < BOUND[torch.float32]
    assert torch.equal(call.k, keys), "the caller's own stay as they are"


def test_a_mask_goes_where_it_is_taken(packages):
    packages()
    call = attention(mask=MASKS["4-D"])
    assert (attend(call, "comfy_kitchen_int8").double() - in_float64(call)).abs().max() < BOUND[torch.float32]
    with pytest.raises(NoKernelError, match="takes no mask"):
        attend(call, "sage")


@pytest.mark.parametrize("backend", EIGHT_BITS)
@pytest.mark.parametrize("error", [AssertionError("headdim should be in [64, 96, 128]."), TypeError("no such dtype")])
def test_what_a_package_does_not_serve_is_left_to_the_host_with_its_words(backend, error, packages):
    asked = []

    def serve(*args):
        asked.append(args)
        raise error

    packages(serve)
    run, call = begin(backend), attention()
    assert all(torch.equal(out, call.host()) for out in run_with(run, call, call))
    assert len(asked) == 1
    assert run.verdict() == (
        "inert",
        f"the {backend} kernel in 0 of 2 attention calls; the host's own (sub_quad) in 2, since {backend} does not "
        f"serve float32 heads 8 wide on this cpu device ({error})",
    )


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_memory_that_ran_out_is_not_taken_for_what_is_not_served(backend, packages):
    def serve(*args):
        raise torch.OutOfMemoryError("out of memory")

    packages(serve)
    with pytest.raises(torch.OutOfMemoryError):
        attend(attention(), backend)


def judged(run, step, *values):
    """Whether a run accepts a latent that holds these in an evaluation of a step."""
    return run.accepts(Evaluation(step, 1.0), torch.tensor([1.0, *values]))


@pytest.mark.parametrize("backend", EIGHT_BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_evaluation_that_overflows_is_made_again_without_it(backend, bad, packages):
    packages()
    run, call = begin(backend), attention(host_name="pytorch")
    run_with(run, call, call)
    assert judged(run, 0)
    run_with(run, call, call)
    assert not judged(run, 1, bad)
    assert all(torch.equal(out, call.host()) for out in run_with(run, call, call))
    assert judged(run, 1)
    run_with(run, call, call)
    assert judged(run, 2, bad), "it is refused once: what comes now is not the kernel's doing"
    assert run.verdict() == (
        "active",
        f"the {backend} kernel in 2 of 6 attention calls; the host's own (pytorch) in 4, since what {backend} gave in "
        f"step 2 was not finite; 2 calls with {backend} were thrown away and computed again",
    )


def test_where_the_host_overflows_too_the_kernel_is_not_blamed(packages):
    packages()
    run = begin("sage")
    run_with(run, attention())
    assert not judged(run, 0, float("nan"))
    run_with(run, attention())
    assert judged(run, 0, float("nan"))
    assert run.verdict()[0] == "inert"
    assert run.verdict()[1].endswith("the host's own gave nothing finite either, so that it is not the kernel's doing")


@pytest.mark.parametrize("backend", ["auto", "math", "sage"])
def test_only_what_a_kernel_in_eight_bits_computed_is_looked_at(backend):
    class Unread:
        def isfinite(self):
            raise AssertionError("it would wait for the device")

    assert begin(backend).accepts(Evaluation(0, 1.0), Unread())


def test_where_a_model_asks_for_precision_it_gets_the_host_s(packages):
    packages()
    run = begin("sage")
    call = replace(attention(), needs_precision=True)
    assert torch.equal(run_with(run, call)[0], call.host())
    assert "in 1, since the model asks for more precision there" in run.verdict()[1]


@pytest.mark.parametrize("backend", EIGHT_BITS)
def test_where_it_can_t_be_it_is_refused_by_name(backend, monkeypatch, packages):
    model = Model("SDXL", "SDXL", 320, 9, 19)
    config, line = AttentionBackend(backend), f'"{sys.executable}" -m pip install'
    with pytest.raises(RuntimeError, match=f"Attention Backend: {backend} needs .* runs on cpu. Choose auto") as error:
        config.check(model)
    assert line in str(error.value)
    gpu = replace(model, device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"{backend} needs the package {MODULES[backend]}, which is not") as error:
        config.check(gpu)
    assert line in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    packages()
    config.check(gpu)
    monkeypatch.setitem(sys.modules, MODULES[backend], None)
    with pytest.raises(RuntimeError, match=f"the installed {MODULES[backend]} can't be used with torch") as error:
        config.check(gpu)
    assert line in str(error.value)


def test_a_gpu_without_int8_attention_is_refused(packages, monkeypatch):
    packages()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(sys.modules["comfy_kitchen"], "int8_attention_is_available", lambda: False)
    assert "compute capability 7.5 or newer" in lacking("comfy_kitchen_int8", "cuda")


# What a checkpoint or another node chose


def test_what_a_checkpoint_names_goes_before_auto_and_gives_way_to_a_kernel_by_name():
    for backend, told in (
        ("auto", "left to ComfyUI: the checkpoint names an attention for 3 of its layers"),
        ("math", "the math kernel in 1 of 1 attention calls; in place of the attention that the checkpoint names for "
         "3 of its layers"),
    ):  # fmt: skip
        run, call = begin(backend), Call()
        call.own_attentions = 3
        run.apply_model(call, lambda call=call: call.attend and call.attend(attention()))
        assert (call.attend is None) == (backend == "auto")
        assert run.verdict() == ("inert" if backend == "auto" else "active", told)


def test_another_node_s_attention_around_it_is_named():
    run, call = begin("math"), Call()
    call.attention_before = "halved"
    run_with(run, attention(), call=call)
    assert (
        run.verdict()[1] == "the math kernel in 1 of 1 attention calls; inside what another node chose before (halved)"
    )
