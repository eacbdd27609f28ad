"""Sweeps without Ray: spaces of settings, and what is made of trials' results."""
