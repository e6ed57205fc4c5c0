"""Everything that reaches into another library's insides, one module a library.

Nothing outside this package touches a library's private parts, and nothing in it edits installed
files or replaces a library's classes. Each module says at its top what it changes, why, which seam
it uses, the versions it was checked against, and when it can go.

Importing the package costs nothing; :func:`apply` imports the libraries.
"""

from __future__ import annotations

from functools import cache

from patches.errors import PatchError

__all__ = ["PatchError", "apply"]


@cache
def apply() -> None:
    """Check that every seam is there. Calling it again does nothing.

    Works in the service, in Ray workers and in a user's own script.

    Raises:
        PatchError: a seam is missing; the sentence names the library and its version.
    """
    from patches import peft, transformers

    peft.check_seam()
    transformers.causal_lm_types()
