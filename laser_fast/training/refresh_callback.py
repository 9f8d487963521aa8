"""Keeping the item matrix fresh while transformers' Trainer trains."""

from typing import Any

from transformers import TrainerCallback, TrainerControl

from laser_fast.laser.model import LaserModel


class RefreshItems(TrainerCallback):
    """Encodes the catalogue anew at the start of every epoch, as phase A does (Laser, section 3.4).

    It also does so before every evaluation, so that its loss is that of the current weights, and at the end, after the
    Trainer may have loaded the best weights: the model then answers and can be saved.

        Trainer(model, arguments, train_dataset=NextItemDataset(rows), data_collator=NextItemCollator(model.builder),
                callbacks=[RefreshItems(model)]).train()

    Args:
        batch_size: items encoded at once.
    """

    def __init__(self, model: LaserModel, *, batch_size: int = 256) -> None:
        self.model = model
        self.batch_size = batch_size

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.model.refresh_items(batch_size=self.batch_size)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        if self.model.items_are_outdated:
            self.model.refresh_items(batch_size=self.batch_size)

    def on_step_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        """Called by the Trainer."""
        if control.should_evaluate:
            self.on_train_end()

    on_epoch_end = on_step_end
