"""What to type to get each optional backend. Plain data: `./slipstream` reads it before anything is installed.

The lines go to ``python -m pip install``, with the python that runs ComfyUI. ``--no-deps`` keeps a
package from bringing another torch, or telemetry; what it needs besides, every ComfyUI has.
"""

INSTALL = {
    "openvino": "--no-deps openvino==2026.4.1",
    "tensorrt": "torch-tensorrt=={torch}",
    "onediff": "--no-deps onediff==1.2.0",
    "stable-fast": "--no-deps --no-build-isolation stable-fast==1.0.5",
    "xla": "torch_xla=={torch}",
}
"""By backend; ``{torch}`` stands for the version of torch that is installed, which they must match."""

TESTED = ("openvino", "onediff")
"""Those that the project's own tests run with. stable-fast is left out: it builds for half an hour."""
