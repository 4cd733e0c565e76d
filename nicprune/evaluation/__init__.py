"""Evaluation of codecs: rate, distortion, time and memory. May use `methods` and the folders below
it.
"""
