"""The jobs of the command line, each from run folder to run folder, each resumable after a kill. One file a verb."""

from fairline.jobs._common import LAST_LAYERS, last_layer_told, settings_told
from fairline.jobs.adjust import adjust_job
from fairline.jobs.audit import audit_job
from fairline.jobs.choose import choices, choose_job
from fairline.jobs.compare import by_seed, compare_job, told_by_seed
from fairline.jobs.compiled import compile_job
from fairline.jobs.constraints import constraints
from fairline.jobs.demo import run_demo
from fairline.jobs.finetune import ablate_job, finetune_job, last_layer_job
from fairline.jobs.imported import import_job
from fairline.jobs.linearize import build_linearizer, linearize_job, placement_of
from fairline.jobs.method_names import steps_told
from fairline.jobs.predicted import audit_predictions_job
from fairline.jobs.quick import quick_settings
from fairline.jobs.theory import theory_job
from fairline.jobs.train import train_job

__all__ = [
    "LAST_LAYERS",
    "ablate_job",
    "adjust_job",
    "audit_job",
    "audit_predictions_job",
    "build_linearizer",
    "by_seed",
    "choices",
    "choose_job",
    "compare_job",
    "compile_job",
    "constraints",
    "finetune_job",
    "import_job",
    "last_layer_job",
    "last_layer_told",
    "linearize_job",
    "placement_of",
    "quick_settings",
    "run_demo",
    "settings_told",
    "steps_told",
    "theory_job",
    "told_by_seed",
    "train_job",
]
