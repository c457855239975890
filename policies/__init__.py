"""Policies: which tokens take part in attention. One file per method."""
