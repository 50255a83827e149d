"""Fewer steps: what schedulers, reuse and smaller models make of a latency, as a table steps x model.

``frontier`` reads the table alone and loads no torch.
"""
