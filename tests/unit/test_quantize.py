"""Quantize: each scheme against quantization by hand, the filter, what is refused and what is told."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections import Counter

import pytest
import torch
from slipstream_pack.nodes.methods import quantize
from slipstream_pack.nodes.methods.method import Evaluation, Model, Pruned, Quantized, Run, Steps
from slipstream_pack.nodes.methods.quantize import Quantize
from torch import nn

CPU_MODEL = Model("SDXL", "SDXL", 320, 9, 19)


@pytest.fixture(autouse=True)
def with_vnni(monkeypatch):
    """As on a processor that has it."""
    monkeypatch.setattr(quantize, "multiplies_in_int8", lambda device: True)
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_in_int8(x):
    """Symmetric, a scale for each row: the numbers, and the scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x * (1 / scale)).round().clamp(-128, 127), scale


def test_int8_by_hand():
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 4.0, -1.0, 0.0]])
    quantized = Quantize("int8 weight-only").quantize(weight)
    assert quantized.qdata.tolist() == [[127, -64, 32, 0], [0, 127, -32, 0]]
    torch.testing.assert_close(quantized.scale, torch.tensor([[1.0], [4.0]]) / 127.5)


def test_int8_weight_only_multiplies_the_activations_as_they_are():
    weight, x, bias = random(48, 32), random(2, 5, 32, seed=1), random(48, seed=2)
    numbers, scale = rows_in_int8(weight)
    expected = x @ (numbers * scale).T + bias
    output = nn.functional.linear(x, Quantize("int8 weight-only").quantize(weight), bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert ((numbers * scale - weight).abs() <= 0.501 * scale).all()


def test_int8_dynamic_quantizes_each_token_too():
    weight, x, bias = (
        random(48, 32),
        random(2, 5, 32, seed=1) * torch.tensor([[[1.0], [9.0], [0.1], [2.0], [5.0]]]),
        None,
    )
    weights, scale = rows_in_int8(weight)
    tokens, token_scale = rows_in_int8(x)
    expected = (tokens @ weights.T) * token_scale * scale.T
    output = nn.functional.linear(x, Quantize("int8 dynamic").quantize(weight), bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_fp8_weight_only_by_hand():
    """448 is the greatest number of float8_e4m3fn."""
    weight, x = random(48, 32), random(7, 32, seed=1)
    scale = weight.abs().amax(-1, keepdim=True) / 448
    expected = x @ ((weight / scale).to(torch.float8_e4m3fn).float() * scale).T
    output = nn.functional.linear(x, Quantize("fp8 weight-only").quantize(weight))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8 dynamic", "int8 weight-only", "fp8 weight-only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_activations_dtype_and_the_weight_is_left_alone(scheme, dtype):
    weight = random(32, 16).to(dtype)
    before = weight.clone()
    quantized = Quantize(scheme).quantize(weight)
    output = nn.functional.linear(random(3, 16).to(dtype), quantized, random(32).to(dtype))
    assert (output.dtype, quantized.dtype, quantized.requires_grad) == (dtype, dtype, False)
    assert torch.equal(weight, before)


@pytest.mark.long
def test_inductor_computes_the_same():
    from torch._inductor import config

    layer = nn.Linear(64, 32)
    layer.weight = Quantize("int8 dynamic").quantize(layer.weight)
    x = random(5, 64)
    # In this process: starting others takes longer.
    with torch.inference_mode(), config.patch(compile_threads=1):
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_nothing_of_inductors_options_is_changed():
    from torch._inductor import config

    before = config.get_config_copy()
    for scheme in ("int8 dynamic", "int8 weight-only", "fp8 weight-only"):
        Quantize(scheme).quantize(random(16, 16))
    assert config.get_config_copy() == before


# The filter

LAYERS = [
    # path, (in, out), whether in a block, why it stays
    ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", (640, 640), True, None),
    ("middle_block.1.proj_in", (1280, 1280), True, None),
    ("double_blocks.0.img_attn.qkv", (3072, 9216), True, None),
    ("layers.0.moderate", (512, 512), True, None),
    ("time_embed.0", (320, 1280), False, "first, last or embedding"),
    ("final_layer.linear", (3072, 64), False, "first, last or embedding"),
    ("input_blocks.1.0.emb_layers.1", (1280, 320), True, "of time embeddings"),
    ("double_blocks.0.img_mod.lin", (3072, 18432), True, "of modulation"),
    ("double_layers.0.modC.1", (3072, 18432), True, "of modulation"),
    ("joint_blocks.3.x_block.adaLN_modulation.1", (1536, 9216), True, "of modulation"),
    ("layers.0.norm1.linear", (2520, 10080), True, "of modulation"),
    ("blocks.0.attn.to_k", (128, 640), True, "small"),
    ("blocks.0.attn.to_k", (640, 128), True, "small"),
    ("blocks.0.attn.to_k", (648, 640), True, "of sides that are no multiples of 16"),
]


@pytest.mark.parametrize(("path", "sides", "is_in_block", "why"), LAYERS)
def test_which_layers_stay_as_they_are(path, sides, is_in_block, why):
    layer = nn.Linear(*sides, device="meta")
    assert Quantize().leaves_out(path, layer, is_in_block) == why


def test_the_filter_can_be_set():
    small, odd = nn.Linear(64, 64, device="meta"), nn.Linear(1001, 640, device="meta")
    assert Quantize(min_features=64).leaves_out("blocks.0.to_q", small, True) is None
    assert Quantize(min_features=65).leaves_out("blocks.0.to_q", small, True) == "small"
    assert Quantize("int8 weight-only").leaves_out("blocks.0.to_q", odd, True) is None
    assert Quantize("2:4 sparse").leaves_out("blocks.0.to_q", nn.Linear(640, 960, device="meta"), True) is None
    assert Quantize("2:4 sparse").leaves_out("blocks.0.to_q", nn.Linear(640, 656, device="meta"), True) == (
        "of sides that are no multiples of 64"
    )
    assert Quantize(skip="attn2, ff").leaves_out("blocks.0.ff.net", odd, True) == "named in skip"
    assert Quantize(skip="ff,attn2 ,") == Quantize(skip=" attn2, ff")
    assert Quantize(skip="").leaves_out("blocks.0.to_q", nn.Linear(640, 640, device="meta"), True) is None


@pytest.mark.parametrize(
    ("setting", "whole", "part"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_when_the_originals_leave_the_device(setting, whole, part):
    config = Quantize(offload_originals=setting)
    assert (config.should_offload(False), config.should_offload(True)) == (whole, part)


# What is refused


@pytest.mark.parametrize(
    "values",
    [
        {"scheme": "int4"},
        {"min_features": -1},
        {"min_features": 1 << 20},
        {"offload_originals": "never"},
        {"sparse_error": -0.1},
        {"sparse_error": float("nan")},
        {"sparse_share": 1.5},
    ],
)
def test_settings_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match=f"Quantize Model: {next(iter(values))} must be"):
        Quantize(**values)


def test_without_torchao_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"Quantize Model: torchao is not installed\. Install it with: ") as error:
        Quantize().check(CPU_MODEL)
    assert str(error.value).endswith(f'"{sys.executable}" -m pip install --no-deps torchao==0.18.*')


def test_a_torchao_that_does_not_fit_is_one_sentence(monkeypatch):
    def fail(name):
        raise ImportError("cannot import name 'ScalingType'\nand more")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        RuntimeError, match=r"can't be used with torch .* \(ImportError: cannot import name 'ScalingType'\)"
    ):
        Quantize().check(CPU_MODEL)


def test_sparse_weights_need_no_torchao(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    Quantize("2:4 sparse").check(CPU_MODEL)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (9, 0)])
def test_fp8_dynamic_needs_a_gpu_that_multiplies_in_fp8(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    reason = quantize.lacking("fp8 dynamic", "cuda")
    assert (reason is None) == (capability >= (8, 9))
    if reason is not None:
        assert "8.9 or newer" in reason
        assert reason.endswith("but this one has 8.6. Choose int8 dynamic.")
    assert "the model runs on cpu. Choose int8 dynamic" in quantize.lacking("fp8 dynamic", "cpu")
    assert quantize.lacking("fp8 dynamic", "xpu") is None


@pytest.mark.parametrize("scheme", quantize.SCHEMES)
def test_other_devices_are_refused(scheme):
    assert "but the model runs on mps" in quantize.lacking(scheme, "mps")


# What is told


class Call:
    """A call of a model of which `made` was made."""

    def __init__(self, made):
        self.made = made

    @contextlib.contextmanager
    def quantizing(self, quantizer):
        yield self.made


def verdict(made, scheme="int8 dynamic", device="cpu", is_compiled=False):
    model = Model("SDXL", "SDXL", 320, 9, 19, device=device)
    run = Quantize(scheme).begin(Run(model, Steps((1.0, 0.0)), lambda percent: percent, is_compiled))
    for one in made:
        assert run.apply_model(Call(one), lambda: "output") == "output"
    return run.verdict()


MADE = Quantized(100, 25 * 2**20, Counter({"small": 3}), 100 * 2**20, 0, 0, 1.25)


def test_the_verdict_has_layers_bytes_and_what_was_left_out():
    assert verdict([MADE, MADE], is_compiled=True) == (
        "active",
        "int8 dynamic: 100 of 103 linear layers, 25 MiB in place of 100 MiB (25%); beside the originals, which stay in "
        "memory; left out: 3 small; quantized in 1.2 s",
    )
    assert verdict([]) == ("inert", "changed nothing: the model was not called")
    state, text = verdict([Quantized(left=Counter({"small": 3, "quantized already": 40}))])
    assert (state, text) == ("inert", "quantized none of 43 linear layers; left out: 40 quantized already, 3 small")


@pytest.mark.parametrize(
    ("scheme", "device", "is_compiled", "told"),
    [
        ("int8 dynamic", "cpu", False, "Compile Model with inductor makes it faster still"),
        ("int8 dynamic", "cuda", False, "add Compile Model: without it, it is slower"),
        ("fp8 dynamic", "cuda", False, "add Compile Model: without it, it is slower"),
        ("int8 weight-only", "cpu", True, "no faster on a CPU: int8 dynamic is"),
        ("fp8 weight-only", "cuda", False, "add Compile Model: without it, unpacking"),
        ("fp8 weight-only", "cuda", True, "it saves memory, not time"),
    ],
)
def test_the_verdict_says_what_the_scheme_needs_to_be_faster(scheme, device, is_compiled, told):
    assert told in verdict([MADE], scheme, device, is_compiled)[1]


def test_without_vnni_int8_dynamic_computes_as_weight_only_and_says_so(monkeypatch):
    weight, x = random(48, 32), random(7, 32, seed=1)
    expected = nn.functional.linear(x, Quantize("int8 weight-only").quantize(weight))
    monkeypatch.setattr(quantize, "multiplies_in_int8", lambda device: device != "cpu")
    assert torch.equal(nn.functional.linear(x, Quantize("int8 dynamic").quantize(weight)), expected)
    for is_compiled in (False, True):
        text = verdict([MADE], "int8 dynamic", "cpu", is_compiled)[1]
        assert "computed as int8 weight-only, so no faster: this processor has no VNNI" in text
        assert "Compile Model" not in text
    assert verdict([MADE], "int8 weight-only", "cpu", False)[1].endswith("so it is no faster on a CPU")
    assert "no VNNI" not in verdict([MADE], "int8 dynamic", "cuda", True)[1]


@pytest.mark.parametrize(("machine", "has_vnni", "expected"), [
    ("x86_64", True, True), ("AMD64", False, False), ("x86_64", False, False), ("arm64", False, True),
])  # fmt: skip
def test_which_processors_multiply_in_int8(machine, has_vnni, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni, raising=False)
    assert quantize.multiplies_in_int8("cpu") == expected
    assert quantize.multiplies_in_int8("cuda")


def test_the_verdict_says_what_else_is_otherwise():
    made = Quantized(10, 10**6, Counter(), 4 * 10**6, 3 * 10**6, 4, 0.0)
    text = verdict([made])[1]
    assert "2.9 MiB of the originals left the device" in text
    assert "4 layers are quantized anew at each call, since hooks change them" in text
    assert "quantized earlier" in text


# 2:4 sparse


class SparseCall:
    """A call of a model that says what it is asked for."""

    def __init__(self, made, asked):
        self.made, self.asked = made, asked

    @contextlib.contextmanager
    def observing(self, pruner, attempt):
        self.asked.append(attempt)
        yield

    @contextlib.contextmanager
    def pruning(self, pruner):
        self.asked.append("pruned")
        yield self.made


def sparse_run(made, evaluations):
    """A run's object after these evaluations, True for one that is made again; and what two calls in each asked for."""
    run = Quantize("2:4 sparse").begin(Run(CPU_MODEL, Steps((1.0, 0.0)), lambda percent: percent))
    asked = []
    for step, is_again in enumerate(evaluations):
        is_observed = run.observes(Evaluation(step, 1.0, is_again=is_again))
        for _ in range(2):
            assert run.apply_model(SparseCall(made, asked), lambda: "output") == "output"
        assert is_observed == (asked[-1] != "pruned")
    return run, asked


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([False, False], [1, 1, "pruned", "pruned"]),
        ([False, True, False], [1, 1, 2, 2, "pruned", "pruned"]),
        ([False, False, True], [1, 1, *["pruned"] * 4]),
    ],
)
def test_the_first_evaluation_is_observed_also_when_it_is_made_again(evaluations, expected):
    assert sparse_run(Pruned(), evaluations)[1] == expected


def test_what_became_of_the_layers_is_told():
    made = Pruned(10, 9 * 2**20, Counter(), 16 * 2**20, elapsed_s=2.0, errors={"a": 0.01, "b": 0.04}, work=0.5)
    assert sparse_run(made, [False, False])[0].verdict() == (
        "active",
        "2:4 sparse: 10 of 10 linear layers, 9.0 MiB in place of 16 MiB (56%); 50% of the multiplications of the "
        "layers that it is for; outputs lose 4.0% at most in the first evaluation, and more in later ones; beside "
        "the originals, which stay in memory; pruned in 2.0 s",
    )
    made.why_dense = "a CPU has no kernels for it"
    text = sparse_run(made, [False, False])[0].verdict()[1]
    assert text.endswith("computed dense, so no faster and no smaller, since a CPU has no kernels for it")
    run, _ = sparse_run(Pruned(left=Counter({"small": 3})), [False, False])
    assert run.verdict() == ("inert", "pruned none of 3 linear layers; left out: 3 small")
    assert "the run had one evaluation" in sparse_run(made, [False])[0].verdict()[1]
    assert "the model was not called" in sparse_run(made, [])[0].verdict()[1]
