"""Metrics of generated images: statistics, distances, feature extractors. No Ray, no I/O of its own."""
