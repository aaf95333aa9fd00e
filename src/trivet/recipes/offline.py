"""What the recipes share that learn from completions in the data."""

from collections.abc import Sequence

import torch

from trivet.batch import Example, Groups, collate


def to_groups(examples: Sequence[Example], device: torch.device | str) -> Groups:
    """The examples with their own completions as one Groups on the device."""
    completions = [ids for example in examples for ids in example.completions]
    learned = [flags for example in examples for flags in example.learned]
    return collate([example.prompt for example in examples], completions, learned).to(device)
