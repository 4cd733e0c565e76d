"""The trained part of a codec with methods attached; all else of it keeps its bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, cast

from torch import nn

from nicprune.codecs.gradient_free import keep_gradients
from nicprune.codecs.layer_kinds.norms import learns_by_running
from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import on_side
from nicprune.methods.contract import Method, Roles


def side_of(method: Method) -> str | None:
    """Return the side that a method prunes alone, and trains."""
    side: str | None = getattr(method.config, "side", None)
    return side


class TrainedPart(nn.Module):
    """The part of `Attached` that knows what is trained."""

    codec: nn.Module
    methods: nn.ModuleList
    roles: Roles

    _drops_gradients = True

    _statistics_frozen: tuple[nn.Module, ...] = ()
    """Layers of the codec that were put into evaluation mode because they are not trained."""

    @property
    def _each(self) -> list[Method]:
        return cast("list[Method]", list(self.methods))

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. Layers of the codec that are not trained, and would learn by
        running (batch norms), stay in evaluation mode.
        """
        super().train(mode)
        self._statistics_frozen = ()
        self._freeze_statistics()
        return self

    def in_mode(self, training: bool) -> Self:
        """Set the mode of the methods; layers of the codec keep theirs, but for those that
        `train` treats apart.
        """
        self.training = training
        self.methods.train(training)
        self._freeze_statistics()
        return self

    def _freeze_statistics(self) -> None:
        """Put layers that would learn by running, and are not trained, into evaluation mode."""
        if self.training and self.pending:
            now = [layer for layer in self._learning_by_running() if layer.training]
            for layer in now:
                layer.eval()
            self._statistics_frozen += tuple(now)

    def _unfreeze_statistics(self) -> None:
        """Undo `_freeze_statistics`."""
        for layer in self._statistics_frozen:
            layer.train(self.codec.training)
        self._statistics_frozen = ()

    def _learning_by_running(self) -> list[nn.Module]:
        """Return the codec's layers that would change by running, and are not trained."""
        is_trained = self._is_trained()
        return [
            layer
            for name, layer in self.codec.named_modules()
            if learns_by_running(layer) and not is_trained(name)
        ]

    def trains(self, name: str) -> bool:
        """Return whether a parameter or layer of the codec, given by name, is trained."""
        return self._is_trained()(name)

    def _is_trained(self) -> Callable[[str], bool]:
        """Return what says of a parameter or layer of the codec, by name, whether it is trained."""
        before, methods = self._side_of_before, self._lasting
        # One prunes the encoder, another the decoder: then nothing needs to stay as it was.
        if len({side for method in methods if (side := side_of(method))}) > 1:
            methods = [method for method in methods if side_of(method) is None]

        def is_trained(name: str) -> bool:
            kept = before is None or on_side(self.codec, name, before)
            return kept and all(method.trains(name) for method in methods)

        return is_trained

    @property
    def _side_of_before(self) -> str | None:
        """The side that was pruned alone before, where these methods are what has stayed of it:
        fine-tuning keeps to it.
        """
        history = provenance(self.codec).history
        stays = history[-1].get("stays") if history else None
        return history[-1].get("side") if stays == [m.name for m in self._lasting] else None

    def frozen(self) -> list[nn.Parameter]:
        """Return the methods' parameters that are not trained."""
        return self.roles.temporal.frozen() if self.roles.temporal is not None else []

    def _fixed(self) -> list[nn.Parameter]:
        """Return the methods' parameters whose training is over."""
        return [p for method in self._each for p in method.fixed()]

    def _untrained(self) -> list[nn.Parameter]:
        """Return the parameters of the codec and of the methods that are not trained."""
        if not self.pending:
            return []
        is_trained = self._is_trained()
        own = [p for name, p in self.codec.named_parameters() if not is_trained(name)]
        return own + self.frozen()

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Leave it to the training loop inside the block which parameters are trained. Outside,
        gradients of those that the methods do not train are dropped.
        """
        keep_gradients(self.parameters())
        before, self._drops_gradients = self._drops_gradients, False
        try:
            yield
        finally:
            self._drops_gradients = before

    @property
    def _lasting(self) -> list[Method]:
        """The methods that do more than help to train."""
        return [method for method in self._each if not method.for_training_only]

    @property
    def pending(self) -> bool:
        """True if a method is attached that does more than help to train."""
        return bool(self._lasting)

    def manually_updated(self) -> list[nn.Parameter]:
        """Return parameters that an optimiser need not (but may) be given."""
        return [p for method in self._each for p in method.manually_updated()]
