"""The whole job from Python, ``import prune_lab as pl``: a model and its verbs; the command line makes the same calls.

What comes back shows itself in a notebook. A verb works in the model's run folder, a temporary one unless ``run`` names
it; what is finished there is not done again. Keywords of a verb are settings without their table, as ``prune-lab config
--show`` lists them: ``model.score(samples=16)`` is ``probe.samples``.
"""
