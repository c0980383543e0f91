"""Training: one loop for base networks, mask learning and finetunes; each room of this folder is a part of it."""

from __future__ import annotations

from fairline.training.augment import random_crop_and_flip
from fairline.training.checkpoint import Stateful
from fairline.training.fit import DEFAULTS, Best, History, Select, Settings, best_epoch, cut_gradients, finetune, train
from fairline.training.loggers import LOGGERS, log_to
from fairline.training.loop import LOOP_DEFAULTS, Diverged, Epoch, LoopSettings, run_epochs
from fairline.training.progress import Progress, ProgressCallback, named_stage
from fairline.training.trial import TRIAL_IMAGES, choose

__all__ = [
    "DEFAULTS",
    "LOGGERS",
    "LOOP_DEFAULTS",
    "TRIAL_IMAGES",
    "Best",
    "Diverged",
    "Epoch",
    "History",
    "LoopSettings",
    "Progress",
    "ProgressCallback",
    "Select",
    "Settings",
    "Stateful",
    "best_epoch",
    "choose",
    "cut_gradients",
    "finetune",
    "log_to",
    "named_stage",
    "random_crop_and_flip",
    "run_epochs",
    "train",
]
