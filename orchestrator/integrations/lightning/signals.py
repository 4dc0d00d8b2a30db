"""Lightning's own signal handling, put aside while ours is at work.

Its SIGTERM handler does a collective inside the handler: a signal that reaches one rank only hangs the job. Its
per-step broadcast of "has rank 0 seen SIGTERM" is replaced by our agreement. Only these three private names are
replaced, on the instances of one trainer, and they are put back afterwards.
"""

from __future__ import annotations

from lightning.pytorch import Trainer


def _nothing() -> None:
    return None


class LightningSignals:
    """Switches Lightning's handlers off for one trainer, and asks its loop to stop at the next true step boundary."""

    def __init__(self, trainer: Trainer) -> None:
        self._connector = trainer._signal_connector
        self._replaced: tuple[tuple[object, tuple[str, ...]], ...] = (
            (trainer._signal_connector, ("register_signal_handlers", "teardown")),
            (trainer.fit_loop.epoch_loop, ("_broadcast_sigterm_tensor",)),
        )

    def take_over(self) -> None:
        """From now on Lightning neither installs nor restores handlers, nor broadcasts once a step."""
        self._connector.received_sigterm = False
        for owner, names in self._replaced:
            for name in names:
                setattr(owner, name, _nothing)

    def give_back(self) -> None:
        """Undo `take_over`."""
        for owner, names in self._replaced:
            for name in names:
                delattr(owner, name)  # the class's method shows again

    def ask_to_stop(self) -> None:
        """Lightning raises SIGTERMException itself: after this step's logs and validation (TEL.on_advance_end), after
        the epoch's end (FL.on_advance_end), or, while validating, after this validation batch (EL)."""
        self._connector.received_sigterm = True
