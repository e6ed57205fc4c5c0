"""The error of this package."""

from __future__ import annotations


class PatchError(RuntimeError):
    """A library lacks the seam a patch needs. The message names the library and its version."""
