"""The Benchmark node on real models: what it counts, compares, keeps and leaves behind."""

from __future__ import annotations

import gc
import itertools
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import hosted
import pytest
import small_models
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from hosted import Counter, PlantedError, execute, latent, prompt, run_node, sample

import nodes as host_nodes

STEPS = 6
ON = {
    "SlipstreamDeepCache": {"cache_interval": 2},
    "SlipstreamCFGCutoff": {"cutoff": 0.5},
    "SlipstreamFreeU": {"preset": "SD 1.5"},
}


def carrying(model, *names):
    for number, name in enumerate(names, 1):
        model = run_node(name, model, str(number), **ON[name])
    return model


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The host's output and temporary folders, in scratch ones."""
    for kind in ("output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


@pytest.fixture
def vae():
    return small_models.vae()


@pytest.fixture
def benchmark(folders):
    """Runs the node, with a small sampler call for what isn't given; gives its output."""

    def run(baseline, candidate, **values):
        call = {"seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "runs": 2}
        for side, seed in (("positive", 10), ("negative", 11)):
            values.setdefault(side, prompt(baseline, seed))
        values.setdefault("latent_image", {"samples": latent(baseline)})
        return execute("SlipstreamBenchmark", "9", baseline=baseline, candidate=candidate, **{**call, **values})

    return run


@pytest.fixture
def kept(last_lines):
    """The verdict that the page shows on the node, with its report."""
    return lambda: hosted.engine("telling.verdicts")._kept[(None, "9")]


def report_of(output):
    return output.ui["slipstream_report"][0]


def latents(monkeypatch):
    """What every sampler call of the benchmark gives, in order."""
    seen, real = [], comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[-1])
    return seen


def test_it_counts_what_went_through_the_network(model, benchmark):
    candidate = carrying(model, "SlipstreamCFGCutoff")
    with Counter(model) as counter:
        report = report_of(benchmark(model, candidate))
    baseline, cutoff = report["variants"]
    assert (baseline["evaluations"], baseline["predictions"], baseline["rows"]) == (6, 12, 12)
    assert (cutoff["evaluations"], cutoff["predictions"], cutoff["rows"]) == (6, 9, 9)
    assert sum(counter.rows) == 3 * (12 + 9)
    assert [len(variant["runs"]) for variant in report["variants"]] == [2, 2]
    assert all(len(run["step_s"]) == 6 for run in baseline["runs"])
    assert (report["status"], report["done"], report["total"]) == ("finished", 6, 6)


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("heun", 11), ("dpm_2", 11), ("dpmpp_2m", 6), ("uni_pc", 6), ("ddim", 6)]
)
def test_a_step_is_no_evaluation(sampler, evaluations, model, benchmark):
    report = report_of(benchmark(model, model, sampler_name=sampler, runs=1))
    for variant in report["variants"]:
        assert variant["evaluations"] == evaluations
        assert len(variant["runs"][0]["step_s"]) == 6
        assert sum(variant["runs"][0]["step_s"]) <= variant["runs"][0]["seconds"]


def test_runs_are_interleaved_after_a_warm_up_of_each(model, benchmark, monkeypatch):
    order, subject = [], hosted.engine("benchmark").Subject
    real = subject.run
    monkeypatch.setattr(subject, "run", lambda self, *args: order.append(self.variant.name) or real(self, *args))
    benchmark(model, carrying(model, "SlipstreamFreeU"), runs=3)
    assert order == ["baseline", "candidate"] * 4


def test_it_samples_as_the_hosts_ksampler_does(model, benchmark, monkeypatch):
    """Batches with their own noise, masks, image to image."""
    generator = torch.Generator().manual_seed(4)
    image = {
        "samples": torch.randn(2, 4, 16, 16, generator=generator),
        "batch_index": [3, 5],
        "noise_mask": torch.rand(2, 1, 128, 128, generator=generator).round(),
    }
    seen = latents(monkeypatch)
    benchmark(model, carrying(model, "SlipstreamFreeU"), latent_image=image, denoise=0.6)
    with torch.inference_mode():
        arguments = (1, STEPS, 5.0, "euler", "normal", prompt(model, 10), prompt(model, 11), image)
        expected = host_nodes.common_ksampler(model, *arguments, denoise=0.6)[0]["samples"]
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[1], expected)


def test_a_model_against_itself_is_the_same_picture(model, benchmark, vae):
    output = benchmark(model, model, vae=vae)
    fidelity = report_of(output)["variants"][1]["fidelity"]
    assert fidelity == {"latent_error": 0.0, "is_identical": True, "ssim": pytest.approx(1.0), "psnr_db": None}
    assert not report_of(output)["variants"][1]["problems"]
    baseline, candidate, difference = output.result[0]
    assert torch.equal(baseline, candidate)
    assert difference.max() == 0


def test_planted_noise_shows_in_its_column(model, benchmark, vae):
    noisy = model.clone()
    # On the last prediction alone, so that the latent is off by just that.
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    noisy.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 0.1 * noise * (args["sigma"].max() < 0.1))
    clean, off = sample(model), sample(noisy)
    report = report_of(benchmark(model, noisy, vae=vae))
    expected = float((off - clean).norm() / clean.norm())
    assert expected > 0
    assert report["variants"][1]["fidelity"]["latent_error"] == pytest.approx(expected, rel=1e-4)
    assert report["variants"][1]["fidelity"]["ssim"] < 1
    assert report["variants"][1]["fidelity"]["psnr_db"] > 0


def test_a_planted_allocation_of_256_mib_shows_in_its_column(model, benchmark):
    hungry = model.clone()

    def allocate(executor, *args, **kwargs):
        block = torch.ones(256 * 1024 * 1024, dtype=torch.uint8)
        return executor(*args, **kwargs), block[0]

    hungry.add_wrapper("predict_noise", lambda *args, **kwargs: allocate(*args, **kwargs)[0])
    report = report_of(benchmark(model, hungry, steps=3, runs=3))
    usual, more = (variant["memory_mib"]["median"] for variant in report["variants"])
    assert more - usual == pytest.approx(256, rel=0.1)
    assert "resident memory" in report["memory_is"]


@pytest.mark.parametrize("what", ["latent", "picture"])
def test_what_is_not_finite_is_said_naming_the_variant(what, model, benchmark, vae, monkeypatch):
    broken = model.clone()
    if what == "latent":
        broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    else:
        decode = comfy.sd.VAE.decode
        other = comfy.sd.VAE(sd=vae.first_stage_model.state_dict())
        monkeypatch.setattr(other, "decode", lambda latent: decode(other, latent) * float("inf"))
    output = benchmark(model, broken, vae=vae, **({} if what == "latent" else {"candidate_vae": other}))
    report = report_of(output)
    assert report["variants"][0]["problems"] == []
    assert report["variants"][1]["problems"] == [f"its {what} has NaN or infinite values"]
    assert f"its {what} has NaN or infinite values" in report["summary"]
    assert (report["variants"][1]["fidelity"] is None) == (what == "latent")
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("ablation", ["each alone", pytest.param("leave one out", marks=pytest.mark.long)])
def test_an_ablation_is_what_wiring_each_by_hand_gives(ablation, model, benchmark, vae, monkeypatch):
    names = list(ON)
    titles = {"SlipstreamDeepCache": "DeepCache", "SlipstreamCFGCutoff": "CFG Cutoff", "SlipstreamFreeU": "FreeU"}
    seen = latents(monkeypatch)
    output = benchmark(model, carrying(model, *names), ablation=ablation, vae=vae)
    variants = report_of(output)["variants"]
    by_name = dict(zip((variant["name"] for variant in variants), seen, strict=False))
    assert len(by_name) == 5
    for name in names:
        alone = ablation == "each alone"
        wired = [name] if alone else [other for other in names if other != name]
        label = f"{titles[name]} alone" if alone else f"without {titles[name]}"
        by_hand = carrying(model, *wired)
        with Counter(model) as counter:
            expected = sample(by_hand, steps=STEPS)
        assert torch.equal(by_name[label], expected)
        variant = next(variant for variant in variants if variant["name"] == label)
        assert variant["rows"] == sum(counter.rows)
        assert [method["title"] for method in variant["methods"]] == sorted(titles[one] for one in wired)
        assert {verdict["title"] for verdict in variant["verdicts"]} == {titles[one] for one in wired}


@pytest.mark.parametrize(("names", "found"), [((), "no"), (("SlipstreamFreeU",), "one")])
def test_an_ablation_that_has_nothing_to_add_says_so(names, found, model, benchmark):
    report = report_of(benchmark(model, carrying(model, *names), ablation="each alone"))
    assert len(report["variants"]) == 2
    assert report["notes"] == [f"ablation 'each alone' has nothing to add: the candidate has {found} Slipstream method"]


def test_the_nodes_show_the_candidates_run_once(model, benchmark, last_lines):
    benchmark(model, carrying(model, *ON), ablation="each alone", runs=2)
    for node_id in ("1", "2", "3"):
        ((state, _),) = last_lines(node_id)
        assert state == "active"
    ((state, text),) = last_lines("9")
    assert state == "active"
    assert text.startswith("candidate: ")
    # They are none of the prompt's own runs.
    assert not any(verdict.totals for verdict in hosted.engine("telling.verdicts")._kept.values())


def test_a_baseline_with_methods_of_its_own_has_its_own_line_on_their_nodes(model, benchmark, last_lines, monkeypatch):
    verdicts = hosted.engine("telling.verdicts")
    monkeypatch.setattr(verdicts, "current_prompt", lambda: verdicts.Prompt("prompt", None, "9"))
    baseline = carrying(model, "SlipstreamDeepCache")
    benchmark(baseline, run_node("SlipstreamFreeU", baseline, "5", preset="SD 1.5"))
    lines = verdicts._kept[(None, "1")].lines.values()
    assert [line["sampler"] for line in lines] == ["node 9, baseline", "node 9, candidate"]
    assert len(last_lines("5")) == 1


def test_a_number_whose_pictures_are_still_there_is_not_taken_again(model, benchmark, folders):
    (folders / "output" / "slipstream").mkdir()
    (folders / "output" / "slipstream" / "benchmark_00001_baseline.png").touch()
    report = report_of(benchmark(model, model, save=True))
    assert report["saved"]["json"]["filename"] == "benchmark_00002.json"


def test_it_saves_everything_and_never_overwrites(model, benchmark, vae, folders):
    reports = [report_of(benchmark(model, carrying(model, "SlipstreamFreeU"), vae=vae, save=True)) for _ in range(2)]
    folder = folders / "output" / "slipstream"
    for number, report in enumerate(reports, 1):
        names = {
            f"benchmark_{number:05}{end}"
            for end in (".json", ".md", "_baseline.png", "_candidate.png", "_difference.png")
        }
        assert names <= {path.name for path in folder.iterdir()}
        assert report["saved"]["json"] == {
            "filename": f"benchmark_{number:05}.json",
            "subfolder": "slipstream",
            "type": "output",
        }
        saved = json.loads((folder / f"benchmark_{number:05}.json").read_text())
        assert saved["variants"] == json.loads(json.dumps(report["variants"]))
        assert saved["machine"]["torch"] == torch.__version__
        assert saved["variants"][1]["methods"][0]["settings"]["b1"] == 1.5
        assert (folder / f"benchmark_{number:05}.md").read_text().startswith("### SD15, 128x128, 6 steps of euler")
    assert len(list(folder.iterdir())) == 10


def test_a_report_that_cannot_be_saved_is_still_shown_and_says_so(model, benchmark, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    report = report_of(benchmark(model, model, save=True))
    assert report["status"] == "finished"
    assert report["saved"] == {}
    assert report["notes"] == ["not everything could be saved: [Errno 28] No space left on device"]


def test_without_saving_nothing_is_left_in_the_output_folder(model, benchmark, vae, folders):
    report = report_of(benchmark(model, model, vae=vae))
    assert list((folders / "output").iterdir()) == []
    image = report["variants"][0]["image"]
    assert image["type"] == "temp"
    assert (folders / "temp" / image["subfolder"] / image["filename"]).exists()
    assert report["saved"] == {}


def test_without_a_vae_latents_are_compared_and_the_image_output_says_why_it_is_empty(model, benchmark):
    output = benchmark(model, carrying(model, "SlipstreamFreeU"))
    fidelity = report_of(output)["variants"][1]["fidelity"]
    assert fidelity["ssim"] is None
    assert fidelity["latent_error"] > 0
    assert isinstance(output.result[0], ExecutionBlocker)
    assert "They need a VAE for pictures" in output.result[0].message


def test_a_vae_of_the_candidates_own_is_measured_in_each_round(model, benchmark, vae):
    output = benchmark(model, model, vae=vae, candidate_vae=vae)
    for variant in report_of(output)["variants"]:
        assert all(run["decode_s"] > 0 and run["decode_memory"]["increase_mib"] >= 0 for run in variant["runs"])
    assert "| decode |" in output.result[1]
    assert "decode" not in benchmark(model, model, vae=vae).result[1]


def test_a_batch_gives_all_its_pictures(model, benchmark, vae):
    output = benchmark(model, model, vae=vae, latent_image={"samples": latent(model, batch=2)}, runs=1)
    assert output.result[0].shape == (6, 128, 128, 3)


def test_loading_is_no_part_of_the_time(model, benchmark, monkeypatch):
    load, total, real = comfy.model_management.load_models_gpu, [], comfy.sample.sample

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return load(*args, **kwargs)

    def timed(*args, **kwargs):
        began = time.perf_counter()
        samples = real(*args, **kwargs)
        total.append(time.perf_counter() - began)
        return samples

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", slow)
    monkeypatch.setattr(comfy.sample, "sample", timed)
    variants = report_of(benchmark(model, model, runs=2))["variants"]
    runs = [variant["warm_up"] for variant in variants]
    runs += [variant["runs"][number] for number in range(2) for variant in variants]
    for run, seconds in zip(runs, total, strict=True):
        assert run["loading_s"] >= 0.3
        assert run["seconds"] == pytest.approx(seconds - run["loading_s"], abs=0.02)
        assert sum(run["step_s"]) <= run["seconds"]


@pytest.mark.parametrize(("is_same", "settled"), [(True, 1), (False, 4)])
def test_weights_that_come_as_they_are_used_come_before_the_clock_starts(
    is_same, settled, model, benchmark, monkeypatch
):
    """Under DynamicVRAM, a step goes before each run that follows another model's."""
    monkeypatch.setattr(hosted.engine("host.machine"), "is_dynamic", lambda patcher: True)
    calls, real = [], comfy.sample.sample
    monkeypatch.setattr(
        comfy.sample, "sample", lambda *args, **kwargs: calls.append(kwargs["last_step"]) or real(*args, **kwargs)
    )
    candidate = carrying(model if is_same else hosted.model("SD15", seed=1), "SlipstreamCFGCutoff")
    report = report_of(benchmark(model, candidate, runs=1))
    assert calls.count(1) == settled
    assert calls.count(None) == 4
    assert [variant["evaluations"] for variant in report["variants"]] == [6, 6]


def test_the_other_variants_models_are_taken_off_the_device_and_no_others(model, monkeypatch):
    other, third = hosted.model("SD15", seed=1), hosted.model("SD15", seed=2)
    for one in (model, other, third):
        sample(one, steps=1)
    kept = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda _, device, keep: kept.extend(keep))
    take_off = hosted.engine("host.machine").take_off_device
    take_off([other.model], torch.device("cpu"))
    assert not kept
    take_off([other.model], torch.device("meta"))
    models = [one.model.model for one in kept]
    assert model.model in models
    assert third.model in models
    assert other.model not in models


def test_an_empty_latent_gets_the_models_channels(model, benchmark, monkeypatch):
    model.model.latent_format = comfy.latent_formats.SD3()
    shapes = []

    def sample(patcher, noise, *args, **kwargs):
        shapes.append((noise.shape, args[6].shape))
        return noise

    monkeypatch.setattr(comfy.sample, "sample", sample)
    empty = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 8}
    report = report_of(benchmark(model, model, latent_image=empty, runs=1))
    assert set(shapes) == {((1, 16, 16, 16), (1, 16, 16, 16))}
    assert report["settings"]["latent"] == [1, 16, 16, 16]
    assert "128x128" in report["title"]


def test_a_vae_that_gives_no_pictures_leaves_the_latents_to_compare(model, benchmark, vae, monkeypatch):
    monkeypatch.setattr(vae, "decode", lambda latent: torch.zeros(1, 44100, 2))
    output = benchmark(model, carrying(model, "SlipstreamFreeU"), vae=vae)
    variant = report_of(output)["variants"][1]
    assert variant["problems"] == ["its VAE gives no pictures: only the latents are compared"]
    assert variant["fidelity"]["ssim"] is None
    assert isinstance(output.result[0], ExecutionBlocker)


def test_a_checkpoint_without_a_vae_is_told_as_the_host_tells_it(model, benchmark):
    with pytest.raises(RuntimeError, match="VAE is invalid"):
        benchmark(model, model, vae=comfy.sd.VAE(sd={}))


def test_models_of_other_families(benchmark):
    dit = hosted.model("DiT")
    report = report_of(benchmark(dit, carrying(dit, "SlipstreamCFGCutoff"), runs=1))
    assert report["variants"][1]["rows"] == 9
    assert report["variants"][1]["fidelity"]["latent_error"] > 0


class Interrupting:
    """A clone that runs something at one of its evaluations, counted over all runs."""

    def __init__(self, model, at, action):
        self.model, self.count = model.clone(), 0

        def predict_noise(executor, *args, **kwargs):
            self.count += 1
            if self.count == at:
                action()
            return executor(*args, **kwargs)

        self.model.add_wrapper("predict_noise", predict_noise)


def fail():
    raise PlantedError("a planted error")


def interrupt():
    comfy.model_management.interrupt_current_processing()
    comfy.model_management.throw_exception_if_processing_interrupted()


@pytest.mark.parametrize(
    ("action", "raised", "status"),
    [
        (interrupt, comfy.model_management.InterruptProcessingException, "interrupted"),
        (fail, PlantedError, "failed"),
    ],
)
def test_what_was_measured_until_an_interrupt_or_error_is_kept_and_nothing_else(
    action, raised, status, model, benchmark, kept, folders, vae
):
    names = ("SlipstreamDeepCache", "SlipstreamCFGCutoff")
    untouched, expected = sample(model), sample(carrying(model, *names))
    options = repr(model.model_options)
    # In the middle of the candidate's second measured run.
    candidate = Interrupting(carrying(model, *names), 2 * STEPS + 3, action).model
    with pytest.raises(raised):
        benchmark(model, candidate, runs=4, save=True, vae=vae)
    verdict = kept()
    report = verdict.record
    assert (report["status"], report["done"], report["total"]) == (status, 5, 10)
    assert [len(variant["runs"]) for variant in report["variants"]] == [2, 1]
    assert report["variants"][1]["speedup"] is not None
    assert report["variants"][1]["fidelity"]["ssim"] < 1
    (line,) = verdict.lines.values()
    assert line["state"] == status
    assert "after 5 of 10 runs" in line["text"]
    saved = json.loads((folders / "output" / "slipstream" / "benchmark_00001.json").read_text())
    assert (saved["status"], len(saved["variants"][0]["runs"])) == (status, 2)
    # Nothing is left, and the next one runs.
    assert repr(model.model_options) == options
    assert torch.equal(sample(model), untouched)
    assert torch.equal(sample(carrying(model, *names)), expected)
    assert report_of(benchmark(model, carrying(model, *names)))["status"] == "finished"


def test_an_interrupt_between_two_runs_is_seen(model, benchmark, kept, monkeypatch):
    subject = hosted.engine("benchmark").Subject
    real = subject.run

    def run(self, *args):
        measured = real(self, *args)
        comfy.model_management.interrupt_current_processing()
        return measured

    monkeypatch.setattr(subject, "run", run)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        benchmark(model, model)
    assert kept().record["done"] == 1


def test_nothing_of_a_benchmark_stays_on_the_models_or_alive(model, benchmark, monkeypatch):
    candidate = carrying(model, *ON)
    alive = weakref.WeakSet()
    probe = hosted.engine("run.probe").Probe
    real = probe.on

    def on(self, *args):
        clone = real(self, *args)
        alive.update((self, clone))
        return clone

    monkeypatch.setattr(probe, "on", on)
    before = [(repr(one.model_options), repr(one.wrappers), dict(one.attachments)) for one in (model, candidate)]
    benchmark(model, candidate, ablation="leave one out")
    assert [
        (repr(one.model_options), repr(one.wrappers), dict(one.attachments)) for one in (model, candidate)
    ] == before
    # The host keeps the clone that it loaded last, as any node's.
    sample(model)
    gc.collect()
    assert not alive


def test_graphs_that_were_compiled_again_are_counted(model, benchmark):
    steady, growing = model.clone(), model.clone()
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    sizes = iter(range(1, 1000))

    def wrapper(size):
        def apply_model(executor, x, *args, **kwargs):
            compiled(torch.ones(size()))
            return executor(x, *args, **kwargs)

        return apply_model

    torch._dynamo.reset()
    steady.add_wrapper("apply_model", wrapper(lambda: 2000))
    growing.add_wrapper("apply_model", wrapper(lambda: next(sizes) // 4 + 3000))
    report = report_of(benchmark(steady, growing, steps=4, runs=2))
    first, second = report["variants"]
    assert (first["warm_up"]["graphs"], first["recompiles"]) == (1, 0)
    assert first["warm_up"]["compile_s"] > 0
    assert second["recompiles"] >= 1


def test_runs_that_differ_at_the_same_seed_are_reported(model, benchmark):
    drifting, evaluations = model.clone(), itertools.count()
    drifting.set_model_sampler_post_cfg_function(lambda args: args["denoised"] + 0.1 * next(evaluations))
    (problem,) = report_of(benchmark(model, drifting, runs=3))["variants"][1]["problems"]
    assert "its runs differ though their seed is the same" in problem


def test_latents_of_different_shapes_are_not_compared(model):
    subject = hosted.engine("benchmark").Subject
    result = hosted.engine("benchmark").Result
    one, two = (subject(name, name, model, None, False) for name in ("baseline", "candidate"))
    one.result, two.result = result(torch.ones(1, 4, 8, 8), None), result(torch.ones(1, 16, 8, 8), None)
    two.compare(one)
    assert two.variant.fidelity is None
    assert "another shape than the baseline's ((1, 16, 8, 8) against (1, 4, 8, 8))" in two.variant.problems[0]


def test_pictures_of_different_sizes_leave_the_latents_to_compare(model):
    subject = hosted.engine("benchmark").Subject
    result = hosted.engine("benchmark").Result
    one, two = (subject(name, name, model, None, False) for name in ("baseline", "candidate"))
    one.result = result(torch.ones(1, 4, 8, 8), torch.ones(1, 64, 64, 3))
    two.result = result(torch.ones(1, 4, 8, 8), torch.ones(1, 128, 128, 3))
    two.compare(one)
    assert two.variant.fidelity.ssim is None
    assert two.variant.fidelity.is_identical
    assert "only the latents are compared" in two.variant.problems[0]


def test_several_latents_in_one_are_refused(model, benchmark):
    nested = pytest.importorskip("comfy.nested_tensor").NestedTensor([latent(model), latent(model)])
    with pytest.raises(ValueError, match="latent_image should be one latent, but holds several"):
        benchmark(model, model, latent_image={"samples": nested})


def test_the_progress_bar_covers_all_runs(model, benchmark, monkeypatch):
    values = []
    monkeypatch.setattr(
        comfy.utils.ProgressBar, "update_absolute", lambda self, value, *_: values.append((value, self.total))
    )
    benchmark(model, model, runs=2)
    assert values == sorted(values)
    assert values[-1] == (36, 36)


def test_the_page_is_told_after_every_run(model, benchmark, monkeypatch):
    verdicts = hosted.engine("telling.verdicts")
    told, real = [], verdicts.publish
    monkeypatch.setattr(
        verdicts,
        "publish",
        lambda where, node, line, record, run: (
            told.append((node.id, line, record)) or real(where, node, line, record, run)
        ),
    )
    benchmark(model, model, runs=1)
    mine = [(line.state, line.text, record["done"]) for node, line, record in told if node == "9"]
    assert [text for _, text, _ in mine[:-1]] == [
        "warm-up: baseline",
        "warm-up: candidate",
        "round 1 of 1: baseline",
        "round 1 of 1: candidate",
    ]
    assert [done for *_, done in mine] == [0, 1, 2, 3, 4]
    assert [state for state, *_ in mine] == ["running"] * 4 + ["active"]
    assert "markdown" in told[-1][2]


def test_the_files_are_where_the_report_says(model, benchmark, vae, folders):
    report = report_of(
        benchmark(model, carrying(model, "SlipstreamFreeU"), vae=vae, ablation="leave one out", save=True)
    )
    for reference in (
        *(variant["image"] for variant in report["variants"]),
        report["difference"],
        *report["saved"].values(),
    ):
        assert (Path(folders) / reference["type"] / reference["subfolder"] / reference["filename"]).stat().st_size > 0


def test_several_seeds_are_taken_in_turn_by_all_and_the_worst_picture_is_told(model, benchmark, vae, monkeypatch):
    calls, real = [], comfy.sample.sample
    monkeypatch.setattr(
        comfy.sample, "sample", lambda *args, **kwargs: calls.append(kwargs["seed"]) or real(*args, **kwargs)
    )
    candidate, small = carrying(model, "SlipstreamCFGCutoff"), {"latent_image": {"samples": latent(model, 8)}}
    report = report_of(benchmark(model, candidate, vae=vae, runs=1, seeds=3, seed=2**64 - 1, **small))
    assert calls == [2**64 - 1, 2**64 - 1, 0, 0, 1, 1]
    assert [len(variant["runs"]) for variant in report["variants"]] == [2, 2]
    monkeypatch.undo()
    expected = []
    for seed in (2**64 - 1, 0, 1):
        one = report_of(benchmark(model, candidate, vae=vae, runs=1, seed=seed, **small))["variants"][1]
        assert one["worst"] is None
        expected.append(one["fidelity"])
    found = report["variants"][1]
    for key in ("ssim", "latent_error"):
        assert found["fidelity"][key] == pytest.approx(sum(one[key] for one in expected) / 3, rel=1e-5)
    assert found["worst"]["ssim"] == pytest.approx(min(one["ssim"] for one in expected), rel=1e-5)
    assert found["worst"]["latent_error"] == pytest.approx(max(one["latent_error"] for one in expected), rel=1e-5)
    assert found["worst"]["ssim"] < found["fidelity"]["ssim"]
    assert "at the worst" in report["summary"]


def test_seeds_that_come_again_are_compared_once_and_must_give_the_same(model, benchmark):
    report = report_of(benchmark(model, carrying(model, "SlipstreamFreeU"), runs=3, seeds=2))
    once = report_of(benchmark(model, carrying(model, "SlipstreamFreeU"), runs=1, seeds=2))
    assert report["variants"][1]["worst"] == once["variants"][1]["worst"]
    assert not report["variants"][1]["problems"]


@pytest.fixture
def timed_by_rows(monkeypatch):
    """Runs take as long as they have rows through the network: rivals are matched by time where that says less."""
    subject = hosted.engine("benchmark").Subject
    real = subject.run

    def run(self, *args):
        measured = real(self, *args)
        return replace(measured, seconds=0.1 * measured.rows)

    monkeypatch.setattr(subject, "run", run)


@pytest.mark.usefixtures("timed_by_rows")
def test_rivals_do_as_much_work_as_the_candidate(model, benchmark, vae, last_lines):
    with Counter(model) as counter:
        report = report_of(benchmark(model, carrying(model, "SlipstreamCFGCutoff"), vae=vae, rivals=True, runs=1))
    baseline, candidate, fewer, easycache = report["variants"]
    assert (fewer["name"], fewer["role"], fewer["rows"]) == ("5 steps", "rival", 10)
    assert easycache["name"].startswith("EasyCache 0.")
    # It skips steps whole, of both conditions.
    assert abs(easycache["rows"] - candidate["rows"]) <= 2
    assert easycache["rows"] < baseline["rows"] == easycache["evaluations"] * 2
    assert (report["done"], report["total"]) == (8, 8)
    for rival in (fewer, easycache):
        assert rival["fidelity"]["ssim"] < 1
        assert len(rival["runs"]) == 1
        assert rival["image"]
        assert not rival["methods"]
    assert any("EasyCache's threshold was found by" in note for note in report["notes"])
    assert sum(counter.rows) < 25 * baseline["rows"]
    # The nodes tell of the candidate alone, and nothing stays on the model.
    assert len(last_lines("1")) == 1
    assert "easycache" not in model.model_options["transformer_options"]
    assert not model.wrappers


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_what_works_within_an_evaluation_is_matched_by_its_time(share, model, benchmark, monkeypatch):
    subject = hosted.engine("benchmark").Subject
    real = subject.run

    def run(self, *args):
        return replace(real(self, *args), seconds=1.0 if self.variant.role == "baseline" else share)

    monkeypatch.setattr(subject, "run", run)
    report = report_of(benchmark(model, carrying(model, "SlipstreamDeepCache"), rivals=True, runs=1))
    rivals = [variant["name"] for variant in report["variants"][2:]]
    if share == 0.5:
        assert rivals[0] == "3 steps"
        assert report["variants"][3]["rows"] < 12
    else:
        assert rivals == []
        assert report["notes"] == ["no rivals: the candidate leaves out no work that they could leave out too"]
        assert (report["done"], report["total"]) == (4, 4)


@pytest.mark.usefixtures("timed_by_rows")
@pytest.mark.parametrize(
    ("error", "told"), [(ImportError("gone"), "this ComfyUI has none"), (PlantedError("no"), "PlantedError: no")]
)
def test_an_easycache_that_cannot_be_is_told(error, told, model, benchmark, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setattr(hosted.engine("benchmark"), "EasyCache", fails)
    report = report_of(benchmark(model, carrying(model, "SlipstreamCFGCutoff"), rivals=True, runs=1))
    assert [variant["name"] for variant in report["variants"]] == ["baseline", "candidate", "5 steps"]
    assert report["notes"] == [f"no EasyCache: {told}"]
    assert (report["status"], report["done"], report["total"]) == ("finished", 6, 6)


def test_an_interrupt_while_a_rival_is_looked_for_ends_it(model, benchmark, monkeypatch, last_lines):
    def interrupted(*args):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(hosted.engine("benchmark"), "EasyCache", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        benchmark(model, carrying(model, "SlipstreamCFGCutoff"), rivals=True)
    assert last_lines("9")[0][0] == "interrupted"


def test_the_threshold_is_found_in_a_few_runs():
    rivals = hosted.engine("rivals")
    for wanted in range(4, 40, 3):
        threshold, rows, runs = rivals.matched(lambda one: max(4, round(40 / (1 + 5 * one))), wanted)
        assert runs <= rivals.TRIES
        assert abs(rows - wanted) <= 2
        assert rivals.LEAST <= threshold <= rivals.MOST
    assert [rivals.fewer_steps(20, share) for share in (1.0, 0.75, 0.51, 0.5, 0.01)] == [20, 15, 11, 10, 1]
