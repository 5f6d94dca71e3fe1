"""Compressors: fewer bytes for a vector, at an error that is bounded.

A *compressor* is a setting (`top_k`, `sign`, ...); fitted to the shapes of a model it is a *codec*, which turns vectors
into payloads of a length that is known beforehand, and back.
"""
