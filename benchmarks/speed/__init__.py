"""How fast a search step is beside other tools', as ratios; `python -m benchmarks.speed`.

This file imports nothing: the peers' interpreters read it too, and they have neither this package's
requirements nor this package.
"""
