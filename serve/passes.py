"""How long passes over prompts take, by their shape and by what lies before their rows."""

from dflash_jax.decoding.width import WidthController

FAR = 1024  # positions before a pass, from which on it shows what they cost


class PassCosts:
    """Seconds of a pass: so many for its shape, and so many for each of its rows and each position before it.

    The controller keeps these numbers, so that all hosts of an engine know the same ones.
    """

    def __init__(self, controller: WidthController):
        self._controller = controller

    def assume(self, shape: tuple[int, int], seconds: float) -> None:
        """Begin with the seconds of a pass of (prompts, tokens of each) with nothing before it."""
        self._controller.assume_costs(("pass", shape), {0: seconds})

    def observe(self, shape: tuple[int, int], before: int, seconds: float) -> None:
        """Take in a pass whose longest prompt has `before` tokens before its rows."""
        start = self._controller.cost(("pass", shape), 0)
        if before == 0:
            self._controller.observe_cost(("pass", shape), 0, seconds)
        elif start is not None and before >= FAR:
            each = (seconds - start) / (shape[0] * shape[1] * before)
            self._controller.observe_cost("position", 0, max(each, 0.0))

    def seconds(self, shape: tuple[int, int], before: int) -> float | None:
        """Return how long a pass will take; None for a shape that was never timed."""
        start = self._controller.cost(("pass", shape), 0)
        each = self._controller.cost("position", 0) or 0.0
        return None if start is None else start + each * shape[0] * shape[1] * before
