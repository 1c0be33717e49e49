"""Compile VAE: the same pixels and latents, one graph for equal tiles, the VAE that came in untouched."""

from __future__ import annotations

import gc
import os
import threading

import hosted
import pytest
import small_models
import torch
from hosted import execute

BACKEND = "inductor" if os.environ.get("SLIPSTREAM_SLOW") else "eager"
VAES = {"KL": small_models.kl_vae, "Tiny": small_models.vae}

every_vae = pytest.mark.parametrize("kind", list(VAES))


def compile_vae(vae, node_id="7", backend=BACKEND, **options):
    return execute("SlipstreamCompileVAE", node_id, vae=vae, backend={"backend": backend, **options}).result[0]


def relative(value, expected):
    return float((value - expected).abs().max() / expected.abs().max())


def latent(height=16, width=16, batch=1):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1))


def pixels(size=64):
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@every_vae
def test_it_decodes_and_encodes_what_the_vae_does(kind, last_lines):
    vae = VAES[kind]()
    expected = vae.decode(latent()), vae.encode(pixels())
    compiled = compile_vae(vae)
    assert relative(compiled.decode(latent()), expected[0]) < 1e-3
    assert relative(compiled.encode(pixels()), expected[1]) < 1e-3
    ((state, text),) = last_lines("7")[-1:]
    assert state == "active"
    assert text.startswith(f"{BACKEND}: the VAE in 1 graph, compiled in")
    assert vae.first_stage_model is not compiled.first_stage_model
    assert torch.equal(vae.decode(latent()), expected[0])
    assert compiled.patcher is vae.patcher


def test_sizes_and_batches(last_lines):
    vae = small_models.kl_vae()
    compiled = compile_vae(vae)
    told = []
    for shape in ((16, 16, 1), (16, 24, 1), (24, 16, 2), (9, 11, 1)):
        assert relative(compiled.decode(latent(*shape)), vae.decode(latent(*shape))) < 1e-3
        told.append(last_lines("7")[-1][1])
    assert "size 16x16 to 24x16" in told[1]
    assert "batch 1 to 2" in told[2]


@pytest.mark.long
def test_equal_tiles_share_one_graph(last_lines):
    """The host decodes with tiles of three shapes: a graph for the first, and with dynamic sizes one for all others."""
    vae = small_models.kl_vae()
    compiled = compile_vae(vae)
    tiles = {"tile_x": 24, "tile_y": 24, "overlap": 8}
    assert relative(compiled.decode_tiled(latent(40, 40), **tiles), vae.decode_tiled(latent(40, 40), **tiles)) < 1e-3
    compiler = compiled.first_stage_model._keeper._held[0].value
    assert compiler.graphs <= 3
    made = compiler.graphs
    compiled.decode_tiled(latent(40, 40), **tiles)
    assert compiler.graphs == made


def test_attention_is_the_hosts_own_again_after_each_call():
    vae = small_models.kl_vae()
    block = vae.first_stage_model.decoder.mid.attn_1
    before = block.optimized_attention
    compile_vae(vae).decode(latent())
    assert block.optimized_attention is before


def test_weights_that_change_are_followed():
    vae = small_models.kl_vae()
    compiled = compile_vae(vae)
    before = compiled.decode(latent())
    vae.first_stage_model.decoder.conv_in.weight.mul_(1.5)
    expected = vae.decode(latent())
    assert relative(expected, before) > 1e-3
    assert relative(compiled.decode(latent()), expected) < 1e-3


def test_twice_with_equal_settings_is_once_and_with_others_refused():
    compiled = compile_vae(small_models.vae(), "1")
    assert compile_vae(compiled, "2") is compiled
    with pytest.raises(ValueError, match="node 3 and node 1 compile the same VAE with different settings"):
        compile_vae(compiled, "3", dynamic="off")


def test_a_vae_that_is_not_for_images_is_refused(last_lines):
    vae = small_models.vae()
    vae.latent_dim = 3
    with pytest.raises(RuntimeError, match=r"Compile VAE: this node compiles autoencoders of images"):
        compile_vae(vae)
    assert last_lines("7")[0][0] == "failed"


def test_a_backend_that_is_missing_is_refused():
    with pytest.raises(RuntimeError, match="Compile VAE: cudagraphs needs an NVIDIA GPU"):
        compile_vae(small_models.vae(), backend="cudagraphs")


def test_a_failure_is_told_and_the_next_decode_runs(monkeypatch, last_lines):
    compiled = compile_vae(small_models.kl_vae(), dynamic="off")
    decoder = compiled.first_stage_model._stage.decoder.conv_in
    handle = decoder.register_forward_hook(lambda *_: None)
    compiled.decode(latent())
    assert last_lines("7")[-1] == ("inert", "compiled nothing: another node has a hook inside")
    handle.remove()

    def fail(*_):
        raise RuntimeError("broken")

    alone = hosted.compiling("backends").ALL[BACKEND]
    with monkeypatch.context() as patch:
        patch.setattr(alone, "compile_graph", fail)
        with pytest.raises(RuntimeError, match=r"Compile VAE: .* could not compile this model .*broken"):
            compiled.decode(latent(20, 20))
    assert last_lines("7")[-1][0] == "failed"
    compiled.decode(latent(20, 20))
    assert last_lines("7")[-1][0] == "active"


def test_dynamic_vram_is_left_by_loading_the_weights_as_a_whole():
    """A stand-in for the host's class, which needs an NVIDIA GPU."""
    vae = small_models.vae()
    expected = vae.decode(latent())
    vae.patcher.__class__ = type("Dynamic", (type(vae.patcher),), {"is_dynamic": lambda self: True})
    compiled = compile_vae(vae)
    assert compiled.patcher is not vae.patcher
    assert not compiled.patcher.is_dynamic()
    assert relative(compiled.decode(latent()), expected) < 1e-3


def test_what_was_compiled_goes_with_the_vae(monkeypatch):
    artifacts = hosted.engine("host.artifacts")
    artifacts._made.clear()
    monkeypatch.setattr(artifacts, "ORPHANED_S", 0.1)
    others = set(threading.enumerate())
    compiled = compile_vae(small_models.vae())
    compiled.decode(latent())
    assert len(artifacts._made) == 1
    del compiled
    gc.collect()
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=5)
    gc.collect()
    assert not artifacts._made


@pytest.mark.long
def test_inductor_decodes_the_same_pixels():
    vae = small_models.vae()
    assert relative(compile_vae(vae, backend="inductor").decode(latent()), vae.decode(latent())) < 1e-3


def test_openvino_decodes_the_same_pixels(last_lines):
    vae = small_models.kl_vae()
    assert relative(compile_vae(vae, backend="openvino").decode(latent()), vae.decode(latent())) < 1e-3
    assert "left to torch: 1 x attention" in last_lines("7")[-1][1]
