"""Files and recipes that are damaged, or made on purpose, tried by the thousand.

    python -m tests.fuzz images --inputs 2000 --seed 1

Every input is a function of its kind, the seed and its number, so that any of them can be tried
again alone. `run` tries them in processes of their own; each kind has a file that makes its inputs
and says what must hold of them.
"""
