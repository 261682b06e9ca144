"""Which of several processes this is. ``accelerate launch`` and ``torchrun`` start them; nothing is scheduled here."""

import os
from datetime import timedelta
from typing import Any

import torch

PATIENCE = timedelta(days=7)  # one process may be done long before another is


class Processes:
    """This process among all that run the same command.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Importing it takes a second, and a single process needs none of it.
            from accelerate import PartialState

            self._state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return 0 if self._state is None else int(self._state.process_index)

    @property
    def count(self) -> int:
        """How many processes there are."""
        return 1 if self._state is None else int(self._state.num_processes)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()
