"""Which ranks are active in a training step."""

from __future__ import annotations

import random

from comps.tuning.elastic.space import SearchSpace


def sample(space: SearchSpace, seed: int, step: int) -> tuple[int, ...]:
    """One configuration, each group drawn independently and uniformly from its ranks.

    It depends on (seed, step) alone, so it is the same on every data-parallel worker and after a
    resume, and no other generator is disturbed. Only ``random()`` is drawn from: Python promises that
    its sequence for a given seed never changes between versions.
    """
    generator = random.Random(f"{seed}/{step}")
    return tuple(group.ranks[int(generator.random() * len(group.ranks))] for group in space.groups)
