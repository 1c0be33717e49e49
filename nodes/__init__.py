"""The nodes of the pack, one file each."""

NODES: tuple[tuple[str, str], ...] = (
    ("recipe", "SlipstreamRecipe"),
    ("forecast", "SlipstreamForecast"),
    ("deepcache", "SlipstreamDeepCache"),
    ("cfg_cutoff", "SlipstreamCFGCutoff"),
    ("freeu", "SlipstreamFreeU"),
    ("quantize", "SlipstreamQuantize"),
    ("compile_model", "SlipstreamCompileModel"),
    ("precision", "SlipstreamPrecision"),
    ("attention_backend", "SlipstreamAttention"),
    ("sequential_offload", "SlipstreamSequentialOffload"),
    ("stage_offload", "SlipstreamStageOffload"),
    ("cpu", "SlipstreamCPU"),
    ("compile_vae", "SlipstreamCompileVAE"),
    ("tiny_vae", "SlipstreamTinyVAE"),
    ("fp16_fix_vae", "SlipstreamFP16FixVAE"),
    ("vae_decode_tiled", "SlipstreamVAEDecodeTiled"),
    ("vae_encode_tiled", "SlipstreamVAEEncodeTiled"),
    ("refiner_handoff", "SlipstreamRefinerHandoff"),
    ("demo_model", "SlipstreamDemoModel"),
    ("benchmark", "SlipstreamBenchmark"),
    ("tune", "SlipstreamTune"),
    ("report", "SlipstreamReport"),
    ("save_plan", "SlipstreamSavePlan"),
    ("load_plan", "SlipstreamLoadPlan"),
)
"""(file, class) of every node, in the order of the menu."""
