"""Which tokens carry loss.

The two switches have the meaning they have in OPEA's fine-tuning component:

=============  ===============  ==============================================================
mask_input     mask_response    loss on
=============  ===============  ==============================================================
true           true or false    what the assistant says, and the EOS that ends it (the default)
false          true             everything else: the prompt, without the response
false          false            every token
=============  ===============  ==============================================================

``mask_input`` wins, since masking both would leave nothing to learn. In a chat of several turns
each of the assistant's turns counts as response, unless its message has ``weight`` 0.
"""

from __future__ import annotations

from collections.abc import Sequence

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


def learnt_tokens(said: Sequence[bool], mask_input: bool, mask_response: bool) -> list[bool]:
    """Which tokens carry loss, given which ones the assistant said."""
    if mask_input:
        return list(said)
    if mask_response:
        return [not each for each in said]
    return [True] * len(said)
