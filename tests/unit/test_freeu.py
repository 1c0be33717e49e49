"""FreeU's arithmetic, against diffusers' and against the paper's formulas."""

from __future__ import annotations

import pytest
import torch
from slipstream_pack.nodes.methods.freeu import (
    AUTO,
    PRESETS,
    FreeU,
    preset_values,
    scale_backbone,
    scale_low_frequencies,
)
from slipstream_pack.nodes.methods.method import Evaluation, Model, Run, Steps

SD15 = Model("SD15", "SD1", 4, 12, 25)


def features(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def begin(version="v1", **values):
    config = FreeU(1.3, 1.4, 0.9, 0.2, version, **values)
    return config.begin(Run(SD15, Steps((1.0, 0.5, 0.0)), lambda percent: 1.0 - percent))


@pytest.mark.parametrize(("width", "index"), [(16, 0), (8, 1)])
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (7, 9), (1, 1)])
def test_v1_is_what_diffusers_does(width, index, size):
    diffusers = pytest.importorskip("diffusers.utils.torch_utils")
    h, skip = features(2, width, *size), features(2, 6, *size)
    expected = diffusers.apply_freeu(index, h.clone(), skip.clone(), b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    ours = begin().output_block(Evaluation(0, 1.0), h, skip)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_v2_scales_by_the_normalized_mean():
    """By hand, two channels on a line of three pixels: means 1, 2, 3, so 0, 1/2, 1 of b - 1 = 0.4."""
    h = torch.tensor([[[[0.0, 2.0, 4.0]], [[2.0, 2.0, 2.0]]]])
    expected = torch.tensor([[[[0.0, 2.0 * 1.2, 4.0 * 1.4]], [[2.0, 2.0, 2.0]]]])
    torch.testing.assert_close(scale_backbone(h, 1.4, "v2"), expected)


def test_low_frequencies_by_hand():
    """A constant image has only the lowest frequency, an alternating one only the highest."""
    constant = torch.full((1, 1, 8, 8), 3.0)
    torch.testing.assert_close(scale_low_frequencies(constant, 0.2), constant * 0.2)
    alternating = torch.tensor([1.0, -1.0]).repeat(8, 4)[None, None]
    torch.testing.assert_close(scale_low_frequencies(alternating, 0.2), alternating)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nothing_given_is_written_to_and_the_dtype_stays(version, dtype):
    h, skip = features(2, 16, 8, 8, dtype=dtype), features(2, 6, 8, 8, dtype=dtype)
    before = h.clone(), skip.clone()
    new_h, new_skip = begin(version).output_block(Evaluation(0, 1.0), h, skip)
    assert torch.equal(h, before[0])
    assert torch.equal(skip, before[1])
    assert (new_h.dtype, new_skip.dtype) == (dtype, dtype)
    assert not torch.equal(new_h, h)


def test_equal_features_have_no_map_and_stay_finite():
    h = torch.ones(1, 4, 1, 1)
    assert torch.equal(scale_backbone(h, 1.4, "v2"), h)


def test_other_widths_and_times_pass_unchanged_and_are_told():
    run = begin(start_percent=0.0, end_percent=0.4)
    h, skip = features(1, 5, 4, 4), features(1, 5, 4, 4)
    assert run.output_block(Evaluation(0, 1.0), h, skip) == (h, skip)
    wide = features(1, 16, 4, 4)
    assert run.output_block(Evaluation(1, 0.5), wide, skip) == (wide, skip)
    state, text = run.verdict()
    assert state == "inert"
    assert "no output block with 8 or 16 channels ran between start_percent 0 and end_percent 0.4" in text


def test_a_device_without_fft_uses_the_cpu_and_says_so(monkeypatch):
    import slipstream_pack.nodes.methods.freeu as module

    h, skip = features(1, 16, 4, 4), features(1, 6, 4, 4)
    expected = begin().output_block(Evaluation(0, 1.0), h, skip)
    monkeypatch.setattr(module, "has_fft", lambda device: False)
    run = begin()
    for a, b in zip(run.output_block(Evaluation(0, 1.0), h, skip), expected, strict=True):
        assert torch.equal(a, b)
    assert "this device has no FFT, so the CPU filtered the skips" in run.verdict()[1]


def test_memory_that_runs_out_is_not_mistaken_for_a_device_without_fft(monkeypatch):
    run, calls = begin(), []

    def out_of_memory(*args, **kwargs):
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    run.output_block(Evaluation(0, 1.0), features(1, 16, 4, 4), features(1, 6, 4, 4))
    monkeypatch.setattr(torch.fft, "fftn", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run.output_block(Evaluation(0, 1.0), features(1, 16, 4, 4), features(1, 6, 4, 4))
    assert calls == [1]
    assert run.has_fft


def test_presets():
    for family, name in AUTO.items():
        assert preset_values("auto", Model("any", family, 320, 12, 25)) == PRESETS[name]
    assert preset_values("SD 1.4", SD15) == PRESETS["SD 1.4"]
    with pytest.raises(RuntimeError, match="preset auto knows SD1, SD2, SDXL, SDXL refiner, but the model is Odd"):
        preset_values("auto", Model("Odd", None, 320, 12, 25))
    with pytest.raises(ValueError, match="preset must be one of"):
        preset_values("SD 9", SD15)


def test_off():
    assert FreeU(1, 1, 1, 1).off()
    assert FreeU(1, 1, 1, 0.9).off() is None
    assert FreeU(1.3, 1.4, 0.9, 0.2, start_percent=0.5, end_percent=0.5).off()
