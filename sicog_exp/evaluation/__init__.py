"""Judging generations: benchmarks through lmms-eval, and the statistics that compare what they return."""
