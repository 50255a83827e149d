"""Programmes on top of prune_lab that are no part of it: they import the package, it never imports them."""
