"""Training without the libraries that transformers imports only because they are there.

What:     has transformers believe that ``datasets`` (which brings pandas) and ``scipy`` are not installed.
Why:      its Trainer and its losses of object detectors import them at once, which takes a training process
          a second before its first step. Our data sets are our own, and nothing here detects objects.
Seam:     ``is_datasets_available`` and ``is_scipy_available`` in ``transformers.utils.import_utils``, which
          look once and remember. Both libraries can be imported as before, by anyone else.
Checked:  transformers 5.23.0.
Goes:     when transformers imports them where it uses them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import Any

from patches.errors import PatchError

UNUSED = ("datasets", "scipy")


def leave_out() -> None:
    """For a process that trains and does nothing else, before it imports transformers' parts.

    Raises:
        PatchError: transformers does not ask for these libraries as it did.
    """
    modules: dict[str, Any] = sys.modules
    hidden = [name for name in UNUSED if name not in modules]
    # None in this place means to Python that there is no such module.
    modules.update(dict.fromkeys(hidden))
    try:
        asking = importlib.import_module("transformers.utils.import_utils")
        for name in UNUSED:
            function = getattr(asking, f"is_{name}_available", None)
            if function is None or (name in hidden and function()):
                raise PatchError(
                    f"transformers {version('transformers')} cannot be told to do without {name} "
                    "(checked with 5.23.0)"
                )
    finally:
        for name in hidden:
            del modules[name]
