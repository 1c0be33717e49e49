"""How measurements are made and told: statistics, memory, fidelity, the report. No ComfyUI in here."""
