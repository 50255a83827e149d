"""A campaign that breaks things on purpose, and looks whether every command still ends as it promises.

``python -m tests.faults --n 1000`` draws cases by kind (``kinds.py``) from a seed. A case is a pair of a kind and a
number: ``--case corrupt:17`` repeats one alone. What is promised: a command ends with exit code 0 and a true result, or
with exit code 2 and one line that says what is wrong; in bounded time and memory; nothing is left half-written.

Torch is imported once, and every command runs in a fork of that process (``forking.py``), so that a command takes as
long as its work and not as long as its imports.
"""
