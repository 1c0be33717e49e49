"""Compiling, without ComfyUI: the backends, and functions that are compiled and counted."""
