"""Tells a loss that jumps from one that drifts away. It only speaks: no rate is ever changed."""

SPIKE = 10.0
"""A loss so many times its recent mean is a spike: batches differ by less."""
DRIFT = 3.0
"""A recent mean so many times its lowest is a stage that diverges."""
NOTHING = 1e-6
"""A loss below it is noise about a student that has learnt all there is."""
MEMORY = 20
"""Steps over which the recent mean forgets, and that have to pass before anything is said."""


class LossWatch:
    """Watches the losses of one stage, and says each of two things once."""

    def __init__(self) -> None:
        self._steps = 0
        self._mean = self._lowest = 0.0
        self._said_spike = self._said_drift = False

    def seen(self, loss: float) -> str | None:
        """Take the next loss, finite; return what there is to say.

        Args:
            loss: Of one step.
        """
        mean, self._steps = self._mean, self._steps + 1
        self._mean += (loss - mean) / min(self._steps, MEMORY)
        if self._steps <= MEMORY:
            self._lowest = self._mean
            return None
        if loss > max(SPIKE * mean, NOTHING) and not self._said_spike:
            self._said_spike = True
            return (
                f"the loss is {loss:.4g}, and its recent mean {mean:.4g}; the learning rate stays"
                " as it is (said once)."
            )
        self._lowest = min(self._lowest, self._mean)
        if self._mean > max(DRIFT * self._lowest, NOTHING) and not self._said_drift:
            self._said_drift = True
            return (
                f"the loss has risen from {self._lowest:.4g} to {self._mean:.4g}, means of about"
                f" {MEMORY} steps: the stage diverges. The learning rate stays as it is; lower it"
                " and start again (said once)."
            )
        return None
