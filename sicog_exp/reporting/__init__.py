"""Showing a run: charts as SVG and the one-file report over generations."""
