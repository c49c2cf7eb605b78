"""How often planted triggers are found, and clean models accused, by ours and by other methods; `python -m
benchmarks.recovery`."""
