"""The reference model: a small real Stable Diffusion pipeline and its scorer, rebuilt from public packages.

``python -m recipes.reference_model train`` does the whole job, ``evaluate`` measures what came out. What it made is
shipped inside the package and found through `prune_lab.assets`.
"""
