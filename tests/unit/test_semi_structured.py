"""2:4 sparsity: which weights go, what the others become, and what is kept of the inputs, against plain algebra."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from slipstream_pack.nodes.methods import semi_structured
from slipstream_pack.nodes.methods.semi_structured import Inputs, magnitudes, prune

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(*given):
    inputs = Inputs(given[0].shape[-1], CPU)
    for x in given:
        inputs.add(x)
    return inputs


def correlated(rows, features, rank, seed=1):
    """Inputs most of which follows from `rank` numbers."""
    return random(rows, rank, seed=seed) @ random(rank, features, seed=seed + 1) + 0.1 * random(rows, features)


def zeros_of_each_four(weight):
    return (weight.unflatten(-1, (-1, 4)) == 0).sum(-1)


def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_larger_two_as_they_are():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, 0.1, 0.2, -5.0]])
    # Of twice the size, the last four count by themselves all the same.
    inputs = observed(torch.diag(torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2])))
    expected = torch.tensor([[0.0, -3.0, 2.0, 0.0, 4.0, 0.0, 0.0, -5.0]])
    torch.testing.assert_close(prune(weight, inputs), expected)
    assert torch.equal(magnitudes(weight, inputs), expected)


def test_what_is_lost_goes_to_the_inputs_that_say_the_same():
    first, second = random(64, seed=1), random(64, seed=2)
    inputs = observed(torch.stack([first, first, second, second], -1))
    weight = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    pruned = prune(weight, inputs)
    assert zeros_of_each_four(pruned).tolist() == [[2]]
    torch.testing.assert_close(pruned.unflatten(-1, (2, 2)).sum(-1), torch.tensor([[3.0, 4.0]]), rtol=0.02, atol=0)
    assert inputs.error(weight, pruned) < 0.02
    assert inputs.error(weight, magnitudes(weight, inputs)) > 0.2


def test_inputs_of_no_rows_count_for_nothing():
    inputs = observed(random(2, 0, 16), random(3, 16))
    assert (inputs.seen, inputs.rows) == (3, 3)
    weight = random(8, 16)
    assert inputs.error(weight, prune(weight, inputs)) < 1


@pytest.mark.parametrize(("features", "rank"), [(16, 16), (64, 8), (64, 64)])
def test_the_weights_that_stay_are_the_best_ones_for_these_inputs(features, rank):
    """Row by row against least squares with the damping as further rows."""
    x, weight = correlated(256, features, rank), random(8, features, seed=5)
    inputs = observed(x)
    pruned = prune(weight, inputs)
    assert (zeros_of_each_four(pruned) == 2).all()
    damping = (256 * semi_structured.DAMPING * x.square().mean()).sqrt()
    rows = torch.cat([x, damping * torch.eye(features)])
    for row, found in zip(weight, pruned, strict=True):
        kept = found != 0
        best = torch.linalg.lstsq(rows[:, kept], rows @ row).solution
        least = (rows @ row - rows[:, kept] @ best).norm()
        assert (rows @ (row - found)).norm() <= 1.02 * least


def test_the_cost_of_a_pair_is_what_remains_when_all_others_make_up_for_it():
    moments = correlated(64, 8, 3).T @ correlated(64, 8, 3) / 64 + 0.01 * torch.eye(8)
    weight = random(3, 8, seed=7)
    cost, which = semi_structured._Costs(moments).least(weight)
    pairs = list(combinations(range(4), 2))
    for row, four in product(range(3), range(2)):
        found = []
        for pair in pairs:
            lost = [4 * four + one for one in pair]
            left = [one for one in range(8) if one not in lost]
            change = torch.zeros(8)
            change[lost] = -weight[row, lost]
            change[left] = -torch.linalg.solve(moments[left][:, left], moments[left][:, lost] @ change[lost])
            found.append(float(change @ moments @ change))
        assert which[row, four] == min(range(6), key=found.__getitem__)
        assert float(cost[row, four]) == pytest.approx(min(found), rel=1e-3)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_corrected_weights_lose_less_than_the_larger_ones_uncorrected(rank):
    x, weight = correlated(512, 64, rank), random(32, 64, seed=5)
    inputs = observed(x[:256])
    for seen in (x[:256], x[256:]):
        errors = [observed(seen).error(weight, make(weight, inputs)) for make in (prune, magnitudes)]
        assert errors[0] < (0.5 if rank < 64 else 0.95) * errors[1]


def test_wide_layers_are_pruned_in_spans_and_rows_in_parts(monkeypatch):
    x, weight = random(128, 32, seed=3), random(12, 32, seed=5)
    whole = prune(weight, observed(x))
    monkeypatch.setattr(semi_structured, "AT_ONCE", 5)
    torch.testing.assert_close(prune(weight, observed(x)), whole, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(semi_structured, "SPAN", 13)
    inputs = observed(x)
    assert [(one.start, one.stop) for one in inputs.spans] == [(0, 12), (12, 24), (24, 32)]
    for span, moments in zip(inputs.spans, inputs.moments, strict=True):
        torch.testing.assert_close(moments, x[:, span].T @ x[:, span], rtol=1e-4, atol=1e-4)
    parts = [prune(weight[:, span], observed(x[:, span])) for span in inputs.spans]
    torch.testing.assert_close(prune(weight, inputs), torch.cat(parts, -1), rtol=1e-4, atol=1e-4)


def test_of_many_inputs_few_are_looked_at_and_fewer_kept():
    x = random(3, 7000, 4)
    inputs = observed(*[x + number for number in range(40)])
    assert (inputs.seen, len(inputs._samples)) == (40 * 21000, semi_structured.CALLS)
    assert 0 < inputs.rows <= 40 * semi_structured.ROWS
    assert all(0 < len(one) <= semi_structured.SAMPLED for one in inputs._samples)


def test_a_tensor_that_comes_twice_in_a_row_counts_once():
    x = random(5, 4)
    assert observed(x, x).rows == 5
    assert observed(x, x.clone()).rows == 10


def test_half_precision_inputs_are_summed_in_float32():
    x = random(300, 8).to(torch.bfloat16) * 1000
    torch.testing.assert_close(observed(x.half(), x).moments[0], 2 * x.float().T @ x.float(), rtol=1e-3, atol=1)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_inputs_that_tell_nothing_have_no_error_that_could_be_small_enough(bad):
    x = torch.zeros(8, 8) if bad == 0.0 else random(8, 8).index_fill(0, torch.tensor([3]), bad)
    inputs, weight = observed(x), random(4, 8, seed=2)
    assert inputs.error(weight, prune(weight, inputs)) == torch.inf


@pytest.mark.parametrize(
    ("capability", "dtype", "told"),
    [
        ((7, 5), torch.float16, "8.0 (RTX 30, A100) or newer, and this has 7.5"),
        ((8, 0), torch.float32, "and this model computes in float32"),
        ((8, 0), torch.float16, None),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_which_gpus_have_kernels(capability, dtype, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = semi_structured.lacks_kernels(torch.device("cuda"), dtype)
    assert (reason is None) == (told is None)
    assert told is None or told in reason
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in semi_structured.lacks_kernels(torch.device("cuda"), dtype)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_other_devices_have_none(device):
    assert "no kernels for it" in semi_structured.lacks_kernels(torch.device(device), torch.float16)
