"""Graphs, nests and sizes as JSON and back: what a saved model consists of, beside tensors.

Reading builds objects of a few known kinds and runs nothing: no pickle, no code, no import.
"""
