"""What each optimization does: torch, no ComfyUI. One file per method; `method.py` says what a method is."""
