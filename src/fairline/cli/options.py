"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fairline.errors import FairlineError

if TYPE_CHECKING:
    from fairline.runs import DataSpec


#: Kept here so that help need not load torch; a test compares it with the registry.
AUDIT_MEASURES = (
    "accuracy",
    "recall",
    "gradient_norm",
    "curvature",
    "margin",
    "boundary_distance",
    "first_order_distance",
    "parameter_distance",
    "excess_loss_bound",
    "binary_curvature_bound",
    "correlation",
    "corrections",
)
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Data set: digits, utkface:age|race|gender, cifar10, cifar100, cifar100:coarse, tiny_imagenet, svhn, "
        "celeba:ATTRIBUTE or folder.",
        show_default=True,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder (or parquet file) of the data; the variable FAIRLINE_DATA by default."),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        help="What makes the groups, if not the label: an attribute or column (race), bins of a number "
        "(age:0-17,18-64,65+), or intersections (race,sex). Several --groups are intersected too.",
    ),
]
OtherGroups = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        help="Other groups than those of the data, of the same images: a column (race), bins of a number "
        "(age:0-17,18-64,65+), or intersections (race,sex). Several --groups are intersected too.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data-option", metavar="KEY=VALUE", help="Further option of the data set, e.g. crop=150 (celeba)."),
]
Unbalanced = Annotated[
    bool | None,
    typer.Option(
        "--unbalanced/--balanced",
        help="Keep 90 % of the first half of the classes and 10 % of the second (digits: on by default; cifar10, "
        "cifar100, tiny_imagenet: off).",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="cnet, cnn, resnet18, resnet34, vgg19, wide_resnet22_8, or your own as module:function or "
        "file.py:function.",
    ),
]
Width = Annotated[int | None, typer.Option("--width", help="Channels of the first stage; the model's own by default.")]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", metavar="KEY=VALUE", help="Further option of the model, e.g. stem_relu=true."),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes", metavar="FILE", help="The classes in the order of the network's outputs: a line each, or JSON."
    ),
]
#: Kept here so that help need not load torch; a test compares it with what there is.
NORMALIZATIONS = ("imagenet", "data", "none")
Normalization = Annotated[
    str | None,
    typer.Option(
        "--normalization",
        help=f"Scale of the pixels: {', '.join(NORMALIZATIONS)} (data: the training part's mean and deviation; "
        "none: from 0 to 1).",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="R,G,B", help="Of each channel, of pixels from 0 to 1, instead; with --std."),
]
Std = Annotated[str | None, typer.Option("--std", metavar="R,G,B", help="Deviation of each channel, likewise.")]
Within = Annotated[float, typer.Option("--within", help="Percentage points that any group or class may lose.")]
Critical = Annotated[
    list[str] | None,
    typer.Option("--critical", metavar="CLASS", help="A class whose recall may not fall at all; may be repeated."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of every random choice; for train, also of the split.")]
Devices = Annotated[
    int, typer.Option("--devices", help="GPUs, or processes on a CPU, that work together; on each host as many.")
]
#: Kept here so that help need not load torch; a test compares it with what there is.
STRATEGIES = ("auto", "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help=f"How they come about: {', '.join(STRATEGIES)}; auto joins those of torchrun, SLURM or 'fabric run', "
        "else starts them.",
    ),
]
#: Kept here so that help need not load torch; a test compares it with the registry.
LOG_TOOLS = ("csv", "tensorboard", "mlflow", "wandb")
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="TOOL",
        help=f"Note the numbers of each epoch in {', '.join(LOG_TOOLS)}; may be repeated. Files go to the run's logs/.",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; the accelerator by default.")]

#: Commands whose runs hold linearized networks that can be trained on.
STUDENTS = ("linearize", "finetune", "last-layer", "adjust", "choose")
#: Kept here so that help need not load torch; a test compares it with the registry.
LINEARIZERS = (
    "snl",
    "deepreduce",
    "cryptonas",
    "senet",
    "autorep",
    "coordinate_descent",
    "delphi",
    "safenet",
    "taylor",
    "shapley",
    "block_relu",
    "layerwise",
    "magnitude",
    "random",
)
OBJECTIVES = (
    "erm",
    "lagrangian",
    "drop",
    "group_dro",
    "chi2_dro",
    "arl",
    "reweighting",
    "logit_adjust",
    "balanced_kd",
    "ada_alpha",
    "ada_margin",
    "long_tail_kd",
    "ldam",
)
ObjectiveName = Annotated[
    str,
    typer.Option(
        "--objective", help=f"What to minimise: {', '.join(OBJECTIVES)}, or your own as file.py:Class or module:Class."
    ),
]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option("--objective-option", metavar="KEY=VALUE", help="Option of the objective, e.g. violation=signed."),
]
Mu = Annotated[
    float | None, typer.Option("--mu", help="Step of Algorithm 1's multipliers (lagrangian: 0.005, over 100 epochs).")
]

#: None leaves the choice to the method, or to a preset.
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training part (100).")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="At the start, then a cosine to zero (0.001).")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images in a step (256).")]
Select = Annotated[
    str,
    typer.Option("--select", help="Best validation epoch by accuracy, loss or worst_group_accuracy; or the last one."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="fp32, bf16, or auto: bf16 where the processor has units for it and a trial says it is faster (as the "
        "base network; for that, the variable FAIRLINE_PRECISION, else auto).",
    ),
]
Students = Annotated[
    Path,
    typer.Argument(metavar="RUN", help=f"Folder of a {', '.join(STUDENTS[:-1])} or {STUDENTS[-1]} run."),
]
Out = Annotated[Path, typer.Option("--out", help="Run folder to write, or to resume.")]
Budgets = Annotated[
    str,
    typer.Option(
        "--budgets", help="ReLUs to keep, comma-separated: fractions (0.5), percents (50%) or counts (12900)."
    ),
]
#: Kept here so that help need not load torch; a test compares it with the registry.
COST_MODELS = ("cheetah", "semi2k", "delphi", "cryptflow2")
CostProtocols = Annotated[str, typer.Option("--protocol", help=f"Comma-separated: {', '.join(COST_MODELS)}.")]
#: Kept here so that help need not load torch; a test compares it with what a cost may be.
COST_MEASURES = ("seconds", "bytes", "rounds")
Wire = Annotated[
    str,
    typer.Option(
        "--network", help="Between the parties: loopback, lan (1 Gb/s, 0.3 ms), wan (100 Mb/s, 40 ms) or MBITS:MS."
    ),
]


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """Read options of the form KEY=VALUE.

    >>> parse_options(["image_size=64", "stem_relu=true", "url=a=b"])
    {'image_size': 64, 'stem_relu': True, 'url': 'a=b'}

    Returns:
        Values by key, each as what it looks like (:func:`parse_value`).

    Raises:
        FairlineError: A pair has no ``=``, no key, or no value.
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise FairlineError(f"'{pair}' is not KEY=VALUE.")
        if not text.strip():
            raise FairlineError(f"'{pair}' gives no value; write none for no value.")
        options[key.strip()] = parse_value(text.strip())
    return options


def method_options(pairs: list[str] | None, job: Callable[..., Any]) -> dict[str, Any]:
    """Read options of a method that are handed on beside a job's own arguments.

    Args:
        pairs: As for :func:`parse_options`.
        job: What they are handed to.

    Returns:
        As there.

    Raises:
        FairlineError: As there; or a key is called like an argument of the job.
    """
    options = parse_options(pairs)
    for key in options:
        if key in (*inspect.signature(job).parameters, "devices", "strategy", "log"):
            raise FairlineError(f"'{key}' is no option of a method but one of the command.")
    return options


def parse_measure_options(pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    """Read options of the form MEASURE.KEY=VALUE.

    >>> parse_measure_options(["curvature.samples=500", "curvature.tolerance=0.01"])
    {'curvature': {'samples': 500, 'tolerance': 0.01}}

    Returns:
        Options by measure.

    Raises:
        FairlineError: A pair does not name a measure and an option.
    """
    options: dict[str, dict[str, Any]] = {}
    for key, value in parse_options(pairs).items():
        measure, dot, name = key.partition(".")
        if not dot or not measure or not name:
            raise FairlineError(f"'{key}' does not name a measure and its option, such as curvature.samples.")
        options.setdefault(measure, {})[name] = value
    return options


def parse_names(text: str, what: str = "name") -> list[str]:
    """Read names, comma-separated.

    >>> parse_names("cheetah, semi2k,")
    ['cheetah', 'semi2k']

    Args:
        text: As it was given.
        what: One of them, for the error message.

    Returns:
        The names, one at least.

    Raises:
        FairlineError: There is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise FairlineError(f"No {what} was given.")
    return names


def parse_value(text: str) -> Any:
    """Read the value of an option.

    >>> [parse_value(text) for text in ("true", "none", "3", "1e-3", "signed")]
    [True, None, 3, 0.001, 'signed']

    Returns:
        The text as the bool, None, int, float or str that it looks like.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    return text


def parse_budgets(text: str) -> list[float]:
    """Read ReLU budgets.

    >>> parse_budgets("0.5,10%,12900")
    [0.5, 0.1, 12900]

    Returns:
        Fractions (float) and counts (int).

    Raises:
        FairlineError: An entry is no number.
    """
    budgets: list[float] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            if entry.endswith("%"):
                budgets.append(float(entry[:-1]) / 100)
            else:
                budgets.append(float(entry) if "." in entry else int(entry))
        except ValueError:
            raise FairlineError(f"Budget '{entry}' is not a fraction (0.5), percent (50%) or count (12900).") from None
        if budgets[-1] < 0 or (isinstance(budgets[-1], float) and not budgets[-1] <= 1):
            raise FairlineError(f"Budget '{entry}' is outside of the network: fractions lie in [0, 1].")
    if not budgets:
        raise FairlineError("No ReLU budget was given.")
    return budgets


#: Heading of the options below in ``--help``.
_TABLE = "Data in a folder with a table (--data folder)"


def _of_table(
    *,
    label: Annotated[
        str | None, typer.Option("--label", help="Column of the label (label).", rich_help_panel=_TABLE)
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(
            "--metadata", help="The table in the folder: CSV or parquet (metadata.csv).", rich_help_panel=_TABLE
        ),
    ] = None,
    test_metadata: Annotated[
        str | None,
        typer.Option("--test-metadata", help="A second table, whose images are the test part.", rich_help_panel=_TABLE),
    ] = None,
    split_column: Annotated[
        str | None,
        typer.Option(
            "--split-column",
            help="Column that says 'test' of the images of the test part (split).",
            rich_help_panel=_TABLE,
        ),
    ] = None,
    white: Annotated[
        float | None,
        typer.Option("--white", help="White in files of 16-bit grey values or floats (4095).", rich_help_panel=_TABLE),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Whether a mirrored image keeps its label (it does).",
            show_default=False,
            rich_help_panel=_TABLE,
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", metavar="PIXELS", help="Side of the images (32), or height x width: 48x64."),
    ] = None,
    keep_together: Annotated[
        str | None,
        typer.Option(
            "--keep-together",
            help="Column whose images no split may part: the patient or lesion; of any data set.",
        ),
    ] = None,
) -> dict[str, Any]:
    """The options of data in a folder that were given."""
    return drop_none(
        label=label,
        metadata=metadata,
        test_metadata=test_metadata,
        split=split_column,
        white=white,
        flip=flip,
        keep_together=keep_together,
        **({} if image_size is None else {"image_size": parse_value(image_size)}),
    )


_FILE = "Predictions in place of runs"


def _of_predictions(
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="CSV or parquet, a row a sample.", rich_help_panel=_FILE),
    ] = None,
    label: Annotated[
        str, typer.Option("--label", metavar="COLUMN", help="Its classes.", rich_help_panel=_FILE)
    ] = "label",
    prediction: Annotated[
        str,
        typer.Option(
            "--prediction",
            metavar="COLUMN",
            help="Predicted classes; 'p_*' for columns of probabilities, p_CLASS each.",
            rich_help_panel=_FILE,
        ),
    ] = "prediction",
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="COLUMN",
            help="The same before linearization, to compare with.",
            rich_help_panel=_FILE,
        ),
    ] = None,
) -> dict[str, Any]:
    """What an audit of predictions reads; empty where it is of runs."""
    about = {"label": label, "prediction": prediction, "reference": reference}
    return {} if predictions is None else {"file": predictions, **about}


def _bundled(argument: str, options: Callable[..., dict[str, Any]]) -> Callable[..., Callable[..., None]]:
    """A decorator that gives a command some options; what is made of them is one argument of it."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [each for each in parameters if each.name != argument]
        added = inspect.signature(options, eval_str=True).parameters

        @functools.wraps(command)
        def called(**given: Any) -> None:
            bundle = options(**{name: given.pop(name) for name in added})
            command(**given, **{argument: bundle})

        told = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *added.values())]
        called.__signature__ = inspect.Signature(told)  # type: ignore[attr-defined]
        return called

    return give


#: Gives a command the options of data in a folder; those that were given are its argument ``table``.
with_table_options = _bundled("table", _of_table)

#: Gives a command the options of predictions in a file; they are its argument ``told``.
with_prediction_options = _bundled("told", _of_predictions)


def data_spec(
    name: str,
    root: Path | None,
    groups: list[str] | None,
    unbalanced: bool | None,
    options: list[str] | None,
    seed: int,
    table: Mapping[str, Any] | None = None,
) -> DataSpec:
    """The data that the options describe; those in ``table`` are of :func:`with_table_options`."""
    from fairline.data import WITHOUT_ROOT
    from fairline.runs import DataSpec

    merged = parse_options(options)
    for option, value in (table or {}).items():
        if option in merged:
            raise FairlineError(f"'{option}' is given twice: as an option of its own, and as --data-option {option}=….")
        merged[option] = value
    if groups:
        merged["groups"] = one_or_all(groups)
    if unbalanced is not None:
        merged["unbalanced"] = unbalanced
    folder = None if name in WITHOUT_ROOT else root or os.environ.get("FAIRLINE_DATA")
    # Absolute: a later command may run from elsewhere.
    return DataSpec(name, None if folder is None else str(Path(folder).expanduser().resolve()), merged, seed)


def network_view(
    spec: DataSpec, classes: Path | None, normalization: str | None, mean: str | None, std: str | None
) -> DataSpec:
    """The data as a network from elsewhere sees them: its order of classes, and its scale of pixels.

    Args:
        spec: The data.
        classes: File with the order of classes.
        normalization: Name of the scale.
        mean: Of each channel, instead.
        std: Likewise.

    Returns:
        The data with what was given among their options.

    Raises:
        FairlineError: The file cannot be read, or a scale is given in two ways, or twice.
    """
    from fairline.data import read_classes

    if normalization is not None and (mean is not None or std is not None):
        raise FairlineError("The scale of the pixels is given twice: take --normalization, or --mean and --std.")
    if (mean is None) != (std is None):
        raise FairlineError(f"--{'mean' if mean else 'std'} needs --{'std' if mean else 'mean'} beside it.")
    given = drop_none(
        classes=None if classes is None else read_classes(classes),
        normalization=normalization,
        mean=parse_numbers(mean, "mean", "a number for each channel,"),
        std=parse_numbers(std, "std", "a number for each channel,"),
    )
    for option in given:
        if option in spec.options:
            raise FairlineError(f"'{option}' is given twice: as --{option}, and as --data-option {option}=….")
    return replace(spec, options={**spec.options, **given})


def parse_numbers(text: str | None, what: str, wanted: str) -> list[float] | None:
    """Read numbers, comma-separated.

    >>> parse_numbers("0.485, 0.456,0.406", "mean", "a number for each channel,")
    [0.485, 0.456, 0.406]

    Args:
        text: The numbers; None where nothing was said.
        what: The option, for the message.
        wanted: What it takes, for the message.

    Returns:
        The numbers, or None.

    Raises:
        FairlineError: An entry is none.
    """
    try:
        return None if text is None else [float(entry) for entry in parse_names(text, "number")]
    except ValueError:
        raise FairlineError(f"--{what} '{text}' is not {wanted} separated by commas.") from None


#: What options of a strength take.
STRENGTHS = "a number, or several"


def one_or_all(groups: list[str] | None) -> str | list[str] | None:
    """What ``--groups`` says: a text, or a list where it was given several times."""
    return groups[0] if groups and len(groups) == 1 else groups or None


def drop_none(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in options.items() if value is not None}


Baseline = Annotated[
    str | None, typer.Option("--baseline", help="Method that the others are compared with (erm, else the first).")
]


def parse_counts(text: str, what: str) -> list[int]:
    """Read whole numbers, comma-separated.

    >>> parse_counts("8, 12,18", "Fraction bits")
    [8, 12, 18]

    Returns:
        The numbers.

    Raises:
        FairlineError: There is none, or an entry is no whole number; ``what`` names them.
    """
    names = parse_names(text, "whole number")
    try:
        return [int(entry) for entry in names]
    except ValueError:
        raise FairlineError(f"{what} '{text}' are not whole numbers, separated by commas.") from None
