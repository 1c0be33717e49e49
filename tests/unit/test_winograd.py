"""Winograd's convolutions against torch's in float64, and what is chosen when."""

from __future__ import annotations

import itertools

import pytest
import torch
from slipstream_pack.nodes.methods import winograd
from slipstream_pack.nodes.methods.method import Model, Run, Steps
from slipstream_pack.nodes.methods.precision import Precision
from slipstream_pack.nodes.methods.winograd import (
    ERROR,
    FORMS,
    HOST,
    POINTS,
    TYPICAL,
    Choice,
    Direct,
    Form,
    Winograd,
    choose,
    convolve,
    forms,
    measure,
    transform_filters,
    transforms,
)
from torch.nn import functional

ALL = (Form(2), Form(4), Form(2, torch.bfloat16))
every_form = pytest.mark.parametrize("form", ALL, ids=str)
CPU = Model("SD15", "SD1", 320, 12, 25)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias):
    return functional.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def ours(x, weight, bias, form, **options):
    return convolve(x, transform_filters(weight, form), bias, form, **options)


def error(x, weight, bias, form, **options):
    """The greatest error, relative to the greatest output that inputs of this size could give."""
    x = x.to(form.products).float()
    weight = weight.to(form.products).float()
    y = ours(x.to(form.products), weight.to(form.products), bias, form, **options)
    off = (y.double() - exact(x, weight, bias)).abs().max()
    most = x.double().abs().amax((0, 2, 3)) * weight.double().abs().sum((2, 3))
    return float(off / (most.sum(1) + (0 if bias is None else bias.abs())).max())


def bound(form):
    return ERROR[form.size, form.products]


# The transforms.


def test_f2_has_the_matrices_of_the_paper():
    """Lavin and Gray's, up to signs that cancel between inputs and filters."""
    rows = {
        "inputs": [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        "filters": [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        "outputs": [[1, 1, 1, 0], [0, 1, -1, -1]],
    }
    for matrix, expected in zip(transforms(2), rows.values(), strict=True):
        paper = torch.tensor(expected, dtype=torch.float64)
        assert torch.equal(matrix.abs(), torch.kron(paper, paper).abs())


@pytest.mark.parametrize("size", list(POINTS))
def test_one_tile_by_hand(size):
    """In float64 the three matrices give the convolution of a tile with a filter, without padding."""
    inputs, filters, outputs = transforms(size)
    tile, weight = random(size + 2, size + 2).double(), random(3, 3, seed=1).double()
    y = outputs @ ((filters @ weight.flatten()) * (inputs @ tile.flatten()))
    expected = functional.conv2d(tile[None, None], weight[None, None])
    torch.testing.assert_close(y.view(size, size), expected[0, 0], rtol=1e-12, atol=1e-12)


# Against float64.


@every_form
@pytest.mark.parametrize("shape", list(itertools.product(range(1, 10), range(1, 10))), ids="{0[0]}x{0[1]}".format)
def test_tiny_and_odd_sizes(form, shape):
    assert error(random(2, 3, *shape), random(5, 3, 3, 3, seed=1), random(5, seed=2), form) < bound(form)


@every_form
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (1, 7), (7, 1), (4, 320), (320, 4), (64, 64), (640, 32)])
def test_channels_and_batches(form, batch, channels, outputs):
    x, weight = random(batch, channels, 13, 10), random(outputs, channels, 3, 3, seed=1)
    for bias in (None, random(outputs, seed=2)):
        assert error(x, weight, bias, form) < bound(form)


def alternating(*shape):
    """The highest frequency in every direction: what the transforms subtract all along."""
    signs = sum(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")) % 2
    return 1.0 - 2.0 * signs


ADVERSARIES = {
    "a large offset": lambda *shape: random(*shape) + 1000,
    "alternating signs": alternating,
    "alternating and large": lambda *shape: 1e4 * alternating(*shape) + random(*shape),
    "one pixel": lambda *shape: torch.zeros(shape).index_fill_(-1, torch.tensor([shape[-1] // 2]), 3e4),
    "a wide range": lambda *shape: random(*shape) * 10 ** (4 * random(*shape, seed=3)),
    "a ramp": lambda *shape: torch.linspace(-100, 100, shape[-1]).expand(shape).contiguous(),
    "tiny values": lambda *shape: 1e-20 * random(*shape),
}


@every_form
@pytest.mark.parametrize("x", list(ADVERSARIES))
@pytest.mark.parametrize("weight", ["random", *ADVERSARIES])
def test_adversarial_inputs(form, x, weight):
    made = ADVERSARIES.get(weight, random)(24, 48, 3, 3)
    assert error(ADVERSARIES[x](2, 48, 19, 22), made, random(24, seed=2), form) < bound(form)


@every_form
def test_features_as_in_a_unet_come_near(form):
    """After a norm and SiLU, with filters as they are initialized."""
    x = functional.silu(random(2, 320, 16, 16)).to(form.products)
    weight = (random(64, 320, 3, 3, seed=1) / (9 * 320) ** 0.5).to(form.products)
    y, expected = ours(x, weight, None, form), exact(x, weight, None)
    error = float((y - expected).norm() / expected.norm())
    assert TYPICAL[form.size, form.products] / 4 < error < TYPICAL[form.size, form.products]


@every_form
def test_blocks_of_any_size_give_the_same(form):
    """Rows of tiles, whole images, several of them: what is worked on at a time changes rounding at most."""
    x, weight = random(5, 16, 22, 18), random(8, 16, 3, 3, seed=1)
    for block_bytes in (1, 2000, 40_000, 100_000, 1 << 30):
        assert error(x, weight, None, form, block_bytes=block_bytes) < bound(form)


@every_form
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_formats_and_dtypes(form, given, wanted, size):
    dtype = form.products
    x, weight = random(2, 6, *size).to(dtype), random(4, 6, 3, 3, seed=1).to(dtype)
    before = x.clone()
    plain = ours(x, weight, None, form)
    y = ours(x.contiguous(memory_format=given), weight, None, form, memory_format=wanted)
    assert y.is_contiguous(memory_format=wanted)
    assert y.dtype == dtype
    assert torch.equal(y, plain)
    assert torch.equal(x, before)


def test_bfloat16_in_and_out_with_float32_between():
    """Rounded once at the end: as near as bfloat16 can be."""
    x, weight = random(2, 64, 16, 16).bfloat16(), random(32, 64, 3, 3, seed=1).bfloat16()
    for form in (Form(2), Form(4)):
        y = ours(x, weight, None, form)
        assert y.dtype == torch.bfloat16
        expected = exact(x, weight, None)
        assert float(((y.double() - expected).abs() / expected.abs().max()).max()) < 2**-8


def test_no_images_give_none():
    assert ours(torch.zeros(0, 3, 8, 8), random(2, 3, 3, 3), None, Form(4)).shape == (0, 2, 8, 8)


# What is chosen.


class Convolution:
    """`methods.method.Convolution`, on tensors."""

    memory_format = torch.contiguous_format
    is_counted = True

    def __init__(self, dtype=torch.float32, room=1 << 30, is_patched=False, known=None):
        self.x, self.weight = random(1, 8, 8, 8).to(dtype), random(8, 8, 3, 3, seed=1).to(dtype)
        self.bias = random(8, seed=2).to(dtype)
        self.room = room
        self.is_patched = is_patched
        self.known = {} if known is None else known
        self.values = {}

    def host(self):
        return functional.conv2d(self.x, self.weight, self.bias, padding=1)

    def derived(self, key, size, make):
        if size > self.room:
            return None
        if key not in self.values:
            self.values[key] = make()
        return self.values[key]

    def once(self, key, make):
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def begin(form="auto", bf16=False, filters_mib=0):
    return Winograd(form, bf16, filters_mib).begin(Run(CPU, Steps((1.0, 0.0)), lambda percent: percent))


def test_measuring_in_turn_leaves_out_what_is_far_behind():
    taken = {HOST: [9, 2, 2, 3], "good": [5, 1, 1, 1], "slow": [1, 99]}
    now, called = [0.0], []

    def run(name):
        called.append(name)
        now[0] += taken[name][called.count(name) - 1]

    seconds = measure({name: lambda name=name: run(name) for name in taken}, lambda: now[0])
    assert seconds == {HOST: 2, "good": 1, "slow": 99}
    assert called == [HOST, "good", "slow"] * 2 + [HOST, "good"] * 2


@pytest.mark.parametrize(("theirs", "winners"), [(3.0, ["F(4x4)", "F(2x2)"]), (1.0, []), (1.04, [])])
def test_the_hosts_own_stays_where_it_is_as_fast(theirs, winners, monkeypatch):
    monkeypatch.setattr(winograd, "measure", lambda runs: {HOST: theirs, "F(2x2)": 2.0, "F(4x4)": 1.0})
    choice = choose(Convolution(), forms("auto", torch.float32))
    assert [str(form) for form in choice.faster] == winners
    assert [choice.saved_s(form) for form in choice.faster] == [2.0, 1.0][: len(winners)]


@pytest.mark.parametrize(("direct", "first"), [(1.1, "direct in bf16"), (1.2, "F(4x4)")])
def test_what_takes_little_memory_may_take_a_little_longer(direct, first, monkeypatch):
    seconds = {HOST: 3.0, "F(2x2)": 2.0, "F(4x4)": 1.0, "direct in bf16": direct}
    monkeypatch.setattr(winograd, "measure", lambda runs: seconds)
    assert str(choose(Convolution(), forms("auto", torch.float32, True)).faster[0]) == first


def test_bfloat16_is_for_features_in_it_and_the_small_form_or_as_allowed():
    assert forms("auto", torch.float32) == (Form(2), Form(4))
    assert forms("auto", torch.float32, True) == (Form(2), Form(4), Direct(torch.bfloat16))
    assert forms("F(4x4)", torch.float32, True) == (Form(4),)
    assert forms("auto", torch.bfloat16) == (Form(2), Form(4), Form(2, torch.bfloat16))
    assert [str(form) for form in ALL] == ["F(2x2)", "F(4x4)", "F(2x2) in bf16"]
    assert all(forms(name, torch.float32) for name in FORMS)


def test_a_choice_is_measured_once_and_stays(monkeypatch):
    counted = []

    def chosen(call, candidates):
        counted.append(call)
        return Choice((Form(4),), {HOST: 3.0, "F(4x4)": 1.0})

    monkeypatch.setattr(winograd, "choose", chosen)
    known = {}
    for _ in range(2):
        run = begin()
        for call in (Convolution(known=known), Convolution(known=known)):
            y = run.convolution(call)
            assert torch.equal(y, ours(call.x, call.weight, call.bias, Form(4)))
    assert len(counted) == 1
    state, text = run.verdict()
    assert state == "active"
    assert text == (
        "2 of 2 calls of 3x3 convolutions, about 4.0 s less; F(4x4) for 1 shape (2 calls); 0 MiB of filters kept"
    )


@pytest.mark.parametrize(("settings", "is_allowed"), [((), True), (("auto",), True), (("fp32",), False)])
def test_who_sets_a_model_to_fp32_means_its_convolutions_too(settings, is_allowed, monkeypatch):
    monkeypatch.setattr(winograd, "has_bf16", lambda: True)
    plan = tuple(Precision(dtype, scope="transformers") for dtype in settings)
    run = Winograd(bf16=True).begin(Run(CPU, Steps((1.0, 0.0)), lambda percent: percent, plan=plan))
    assert run.may_be_bf16 == is_allowed


def test_settings_that_mean_the_same_are_equal():
    assert Winograd("F(4x4)", True) == Winograd("F(4x4)", False)
    assert Winograd("auto", True) != Winograd("auto", False)


def test_where_the_host_is_faster_its_own_bits_come_and_the_verdict_says_so(monkeypatch):
    monkeypatch.setattr(winograd, "choose", lambda *_: Choice((), {HOST: 1.0}))
    run, call = begin(), Convolution()
    assert torch.equal(run.convolution(call), call.host())
    state, text = run.verdict()
    assert state == "inert"
    assert text == "no 3x3 convolution was replaced; ComfyUI's own for 1 shape (1 call): it is faster"


def test_what_fits_is_taken_where_the_fastest_does_not(monkeypatch):
    monkeypatch.setattr(winograd, "has_bf16", lambda: True)
    faster = (Form(4), Direct(torch.bfloat16))
    seconds = {HOST: 3.0, **dict.fromkeys(map(str, faster), 1.0)}
    monkeypatch.setattr(winograd, "choose", lambda *_: Choice(faster, seconds))
    run, call = begin(bf16=True), Convolution(room=8 * 8 * 9 * 2)
    assert torch.equal(run.convolution(call), convolve_directly(call))
    assert "direct in bf16 for 1 shape (1 call)" in run.verdict()[1]


def convolve_directly(call):
    direct = Direct(torch.bfloat16)
    return direct.convolve(call.x, direct.transform(call.weight), call.bias, call.memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_directly_in_bfloat16_the_error_is_that_of_bfloat16(memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 9, 11, generator=generator).to(memory_format=memory_format)
    weight, bias = torch.randn(32, 64, 3, 3, generator=generator) / 24, torch.randn(32, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = Direct(torch.bfloat16)
    y = direct.convolve(x, direct.transform(weight), bias, memory_format)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=memory_format)
    assert 1e-4 < float((y - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 7), (8, 8), (20, 20)])
def test_deep_and_small_it_is_a_product_and_the_same(size, memory_format, has_bias, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1024, *size, generator=generator).to(memory_format=memory_format)
    weight = torch.randn(48, 1024, 3, 3, generator=generator) / 96
    bias = torch.randn(48, generator=generator) if has_bias else None
    direct, products = Direct(torch.bfloat16), []
    product = winograd._product
    monkeypatch.setattr(winograd, "_product", lambda *given: products.append(1) or product(*given))
    y = direct.convolve(x, direct.transform(weight), bias, memory_format)
    assert len(products) == (size != (20, 20))
    assert y.dtype == torch.float32
    assert y.shape == (2, 48, *size)
    assert y.is_contiguous(memory_format=memory_format)
    wide = None if bias is None else bias.double()
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), wide, padding=1)
    assert 1e-4 < float((y - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("form", FORMS)
def test_without_memory_for_filters_the_hosts_own_runs(form, monkeypatch):
    monkeypatch.setattr(winograd, "choose", lambda *_: pytest.fail("it was measured"))
    run, call = begin(form), Convolution(room=100)
    assert torch.equal(run.convolution(call), call.host())
    state, text = run.verdict()
    assert state == "inert"
    assert "1 shape (1 call): filters would take more than they may (0 MiB, half of what was to spare)" in text


@pytest.mark.parametrize(("bound", "kept"), [(0, 3), (3, 3), (2.5, 2), (1, 1), (0.9, 0)])
def test_a_bound_that_is_set_holds_for_those_that_come_first(bound, kept, monkeypatch):
    """In each call anew the same."""
    monkeypatch.setattr(winograd, "MIB", 1)
    size = Form(4).filter_bytes(Convolution().weight)
    run, calls = begin("F(4x4)", filters_mib=int(bound * size)), [Convolution() for _ in range(3)]
    for _ in range(2):
        outputs = [run.convolution(call) for call in calls]
        assert [not torch.equal(y, call.host()) for y, call in zip(outputs, calls, strict=True)] == [
            number < kept for number in range(3)
        ]
    assert sum(run.kept.values()) == kept * size
    text = run.verdict()[1]
    assert (f"filters would take more than they may ({int(bound * size)} MiB)" in text) == (kept < 3)


def test_within_a_bound_what_fits_is_taken_where_the_fastest_does_not(monkeypatch):
    monkeypatch.setattr(winograd, "MIB", 1)
    faster = (Form(4), Direct(torch.bfloat16))
    seconds = {HOST: 3.0, **dict.fromkeys(map(str, faster), 1.0)}
    monkeypatch.setattr(winograd, "choose", lambda *_: Choice(faster, seconds))
    run, call = begin(bf16=True, filters_mib=8 * 8 * 9 * 2), Convolution()
    assert torch.equal(run.convolution(call), convolve_directly(call))


@pytest.mark.parametrize("bound", [-1, 1 << 21])
def test_a_bound_that_means_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="Winograd: filters_mib must be"):
        Winograd(filters_mib=bound)


def test_patched_weights_are_left_to_the_host():
    run, call = begin("F(4x4)"), Convolution(is_patched=True)
    assert torch.equal(run.convolution(call), call.host())
    assert "1 shape (1 call): weights are cast or patched as they are used" in run.verdict()[1]


def test_what_is_only_timed_does_not_count():
    run, call = begin("F(2x2)"), Convolution()
    run.convolution(call)
    before = run.verdict()
    call.is_counted = False
    run.convolution(call)
    assert run.verdict() == before


def test_a_fixed_form_is_not_measured():
    run, call = begin("F(2x2)"), Convolution()
    assert torch.equal(run.convolution(call), ours(call.x, call.weight, call.bias, Form(2)))
    assert call.known == {}
    assert run.verdict() == (
        "active",
        "1 of 1 call of 3x3 convolutions; F(2x2) for 1 shape (1 call); 0 MiB of filters kept",
    )


def test_it_is_measured_for_real():
    run, call = begin(), Convolution()
    y = run.convolution(call)
    (choice,) = call.known.values()
    assert HOST in choice.seconds
    torch.testing.assert_close(y, call.host(), rtol=1e-4, atol=1e-4)
    assert "measured 1 shape " in run.verdict()[1] or not choice.faster


def test_settings_and_models():
    with pytest.raises(ValueError, match=r"Winograd: form must be one of auto, F\(2x2\), F\(4x4\), but is 'F'"):
        Winograd("F")
    with pytest.raises(RuntimeError, match=r"Winograd: it speeds up convolutions on a processor, but .* runs on cuda"):
        Winograd().check(Model("SD15", "SD1", 320, 12, 25, device="cuda"))
    with pytest.raises(RuntimeError, match="which is none"):
        Winograd().check(Model("Flux", None, None, 0, 0))
    Winograd().check(CPU)


@every_form
def test_without_onednn_the_products_are_torchs(form, monkeypatch):
    monkeypatch.setattr(winograd, "has_onednn", lambda: False)
    assert error(random(2, 16, 11, 9), random(8, 16, 3, 3, seed=1), random(8, seed=2), form) < bound(form)
