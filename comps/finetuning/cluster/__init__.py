"""The Ray cluster that runs the jobs: a local head of our own, or one that the operator names.

Ray is a cache: whatever this package reports, the database and the job directories are the truth.
"""

from comps.finetuning.cluster.cluster import Cluster
from comps.finetuning.cluster.errors import ClusterUnavailable

__all__ = ["Cluster", "ClusterUnavailable"]
