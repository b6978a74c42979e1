"""Metrics: plain functions of arrays that return the value per example and the aggregate."""

from analysis.metrics.lds import LDS, LDSDifference, Truth, lds, lds_difference, read_truth

__all__ = ["LDS", "LDSDifference", "Truth", "lds", "lds_difference", "read_truth"]
