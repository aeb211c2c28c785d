"""Benchmarks that can be believed: contenders in turns, intervals of their ratios, and what they ran on."""
