"""The errors of this package."""

from __future__ import annotations


class ClusterUnavailable(Exception):
    """Ray does not answer, or refuses us. Says nothing about the jobs: they may well be running."""


class NodesLost(ClusterUnavailable):
    """Ray answers, and had nodes, none of which lives."""
