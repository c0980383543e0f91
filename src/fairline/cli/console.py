"""What the terminal shows: progress, tables, closing lines."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fairline.errors import FairlineError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from fairline.report.verdict import Candidate
    from fairline.runs import Run
    from fairline.training import Progress as Report
    from fairline.training import ProgressCallback


#: What the terminal shows beside accuracy; the report shows all.
EXPLAINED_BY = ("gradient_norm", "hessian_max", "margin", "boundary_distance", "excess_loss", "bound")


def visible(text: str) -> str:
    r"""Write out what a terminal would obey: control characters, line separators, changes of direction.

    >>> print(visible("red: \x1b[31m"))
    red: \x1b[31m

    Returns:
        The text; new lines and tabs stay.
    """
    obeyed = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    return re.sub(obeyed, lambda found: repr(found[0])[1:-1], text)


class LiteralConsole(Console):
    """A console that shows every text as it is.

    Texts hold names from data, options and errors, and some of those look like Rich's markup or emoji codes. What is
    to have a style is a :class:`rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as Rich draws it."""
        return super().render_str(visible(text), **options)


out_console = LiteralConsole()
err_console = LiteralConsole(stderr=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """Draw progress reports, one bar a stage, with the time left."""
    # In a narrow terminal the message gives way, never the time left.
    columns = (
        _text_column("{task.description}", max_width=34),
        BarColumn(bar_width=12),
        TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=8)),
        _text_column("{task.fields[message]}", ratio=1),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=err_console, refresh_per_second=4) as drawn:

        def report(update: Report) -> None:
            if update.stage not in bars:
                bars[update.stage] = drawn.add_task(visible(update.stage), total=update.total, message="")
            message = visible(update.message)
            drawn.update(bars[update.stage], completed=update.done, total=update.total, message=message)

        try:
            yield report
        except KeyboardInterrupt:
            drawn.stop()
            err_console.print("Interrupted; repeat the command to resume.")
            sys.exit(130)


def work_together(
    job: Callable[..., Run], *arguments: Any, log: tuple[Path, Sequence[str] | None] | None = None, **settings: Any
) -> Run:
    """Do a job on one device or several and draw its progress; of several processes only the first says what follows.

    Args:
        job: One of :mod:`fairline.jobs`.
        arguments: Its own.
        log: The run's folder, and the tools that are told the numbers of each epoch.
        settings: Its own, and ``devices`` and ``strategy``; see :func:`fairline.ranks.launch`.

    Returns:
        The finished run.

    Raises:
        FairlineError: The input is wrong, or a process was lost.
    """
    from fairline.ranks import RankLost, here, launch
    from fairline.training import log_to

    folder, tools = log or (".", None)
    try:
        with progress_bars() as drawn, log_to(tools or (), folder) as noted:

            def progress(update: Report) -> None:
                drawn(update)
                noted(update)

            run: Run = launch(job, *arguments, progress=progress, **settings)
    except FairlineError as error:
        if here().is_first or isinstance(error, RankLost):
            raise
        sys.exit(2)
    if not here().is_first:
        sys.exit()
    return run


def _text_column(form: str, **room: Any) -> TextColumn:
    return TextColumn(form, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", **room))


def print_frame(frame: pd.DataFrame, title: str, formats: dict[str, str] | None = None) -> None:
    """Draw a table; columns that do not fit beside the others stand in a second one below."""
    columns = {
        str(name): ["" if cell != cell else visible(format(cell, (formats or {}).get(str(name), ""))) for cell in cells]
        for name, cells in frame.items()
    }
    head, names = str(frame.index.name or ""), [visible(str(name)) for name in frame.index]
    # Names stay whole, up to a point.
    first = min(max(16, out_console.width * 3 // 10), max(map(cell_len, [head, *names])))
    for block in _fitting(columns, out_console.width - first - 4):
        table = Table(title=title, title_justify="left")
        table.add_column(head, width=first, overflow="fold")
        for column, width in block.items():
            table.add_column(column, justify="right", overflow="fold", width=width)
        for index, *cells in zip(names, *(columns[column] for column in block), strict=True):
            whole = zip(cells, block.values(), strict=True)
            table.add_row(
                index, *(cell if cell_len(cell) <= width else cell.replace(" [", "\n[") for cell, width in whole)
            )
        out_console.print(table)
        title = ""


def _fitting(columns: dict[str, list[str]], room: int) -> list[dict[str, int]]:
    """Columns in blocks that each fit into ``room`` cells, and their widths: intervals and words stay whole."""
    frame_of_column = 3  # a line and two spaces
    piece = re.compile(r"\[[^\]]*\]|\S+")
    least = {
        name: max(cell_len(found) for text in [visible(name), "-", *cells] for found in piece.findall(text))
        for name, cells in columns.items()
    }
    blocks: list[dict[str, int]] = [{}]
    for name, width in least.items():
        if blocks[-1] and sum(blocks[-1].values()) + width + frame_of_column * (len(blocks[-1]) + 1) > room:
            blocks.append({})
        blocks[-1][name] = min(width, max(room - frame_of_column, 4))
    for block in blocks:
        spare = room - sum(block.values()) - frame_of_column * len(block)
        for name, width in block.items():
            given = max(0, min(spare, max(map(cell_len, [visible(name), *columns[name]])) - width))
            block[name] += given
            spare -= given
    return blocks


def duration(seconds: float) -> str:
    """``"3 hours"``."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def say_best(run: Run) -> None:
    """What base training reached."""
    rows = run.table("metrics.parquet")
    if rows.empty:
        out_console.print(f"The weights are taken as they are. Written to {run.folder}", soft_wrap=True)
        _print_first_look(run)
        return
    best = rows.sort_values(["val_accuracy", "val_loss"], ascending=[False, True]).iloc[0]
    out_console.print(
        f"Best epoch {best['epoch']:.0f} of {len(rows)}: validation accuracy {best['val_accuracy']:.1%}, "
        f"worst group {best['val_worst_group_accuracy']:.1%}. Written to {run.folder}",
        soft_wrap=True,
    )


class _Shown(logging.Handler):
    """What a library warns of, as a line of the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print it, once where several runs of a command log the same."""
        if record.getMessage() in self.told:
            return
        self.told.add(record.getMessage())
        sentence = Text(f"Warning: {visible(record.getMessage())}", style="yellow")
        err_console.print(sentence, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show what fairline warns of, which a run's log alone would hold."""
    package, handler = logging.getLogger("fairline"), _Shown()
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)


def say_strengths(run: Run) -> None:
    """What strength each network has that was chosen, or adjusted."""
    table = run.table("metrics.parquet")
    for row in table[table["chosen"]].to_dict("records"):
        line = f"{row['network']}: " + (row["strength"] if "strength" in row else f"τ = {row['tau']:g}")
        if "accuracy" in row:
            line += f", validation accuracy {row['accuracy']:.1%}, worst group {row['worst_group_accuracy']:.1%}"
        if row.get("largest_loss", math.nan) == row.get("largest_loss", math.nan):
            line += f", largest loss of a group {row['largest_loss']:.1f} points"
        out_console.print(line, soft_wrap=True)


def _print_first_look(run: Run) -> None:
    """What weights that were taken as they are do on the validation part, and whether they can be exported."""
    import pandas as pd

    from fairline._io import read_json

    file = run.folder / "first_look.json"
    if not file.exists():
        return
    found = read_json(file)
    size = "×".join(map(str, found["image_size"]))
    mean, std = (", ".join(f"{value:.3f}" for value in found[key]) for key in ("mean", "std"))
    part = {"val": "validation"}.get(found["part"], found["part"])
    out_console.print(f"Images of {size} pixels, normalised by mean {mean} and deviation {std}.", soft_wrap=True)
    for key, index, column in (("accuracy", "group", "accuracy"), ("recall", "class", "recall")):
        frame = pd.DataFrame(found[key]).T[["value", "n"]].astype(float).set_axis([column, "n"], axis=1)
        frame.index.name = index
        print_frame(frame, f"{column} by {index}, {part} part", {column: ".1%", "n": ",.0f"})
    for sentence in found["warnings"]:
        err_console.print(f"Warning: {sentence}", style="yellow", highlight=False, soft_wrap=True)
    if found["order"]:
        out_console.print(f"That order stands in {run.folder / 'classes.txt'}", soft_wrap=True)
    out_console.print(found["export"], highlight=False, soft_wrap=True)


def list_networks(run: Run) -> None:
    """The networks of a run, a line each."""
    from fairline._io import read_json

    for folder in run.networks().values():
        info = read_json(folder / "network.json")
        out_console.print(
            f"{info['relus']:>9,} of {info['total']:,} ReLUs ({100 * info['relus'] / info['total']:.3g} %): {folder}",
            soft_wrap=True,
            highlight=False,
        )


def print_comparison(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> None:
    """A comparison's verdicts and tables, and its page."""
    from fairline.data.grouped import OVERALL, WORST
    from fairline.report.comparison import judged, kept_fewer, limits, prepare, write_comparison
    from fairline.report.null_front import summary, undoing
    from fairline.report.page import too_small
    from fairline.report.verdict import headline, signed

    frame = prepare(run.table("comparison.parquet"))
    found = judged(run, within, critical)
    if found:
        _print_verdicts(found)
        out_console.print(headline(found), highlight=False)
    baseline = frame["baseline"].iloc[0]
    for budget, part in frame[frame["class"] == ""].groupby("budget", sort=False):
        accuracy = part[part["measure"] == "accuracy"].pivot_table(
            index="method", columns="group", values="value", sort=False
        )
        gains = part[part["measure"] == "gain"]
        by_group = gains[~gains["group"].isin([OVERALL, WORST])]
        worst = gains[gains["group"] == WORST].set_index("method")
        above = part[part["measure"] == "above_null"].set_index("method")
        front = part[part["measure"] == "pareto"].set_index("method")["value"]
        table = accuracy[[OVERALL, WORST]].map("{:.1%}".format)
        table["gain of worst [95 %]"] = [
            f"{signed(worst.loc[m, 'value'])} {limits(worst.loc[m])}" if m in worst.index else "" for m in table.index
        ]
        if len(above):
            table["above free line [95 %]"] = [
                f"{signed(above.loc[m, 'value'])} {limits(above.loc[m])}" if m in above.index else ""
                for m in table.index
            ]
        table["groups better"] = by_group[by_group["low"] > 0].groupby("method").size().reindex(table.index).fillna(0)
        table["worse"] = by_group[by_group["high"] < 0].groupby("method").size().reindex(table.index).fillna(0)
        table["front"] = ["◆" if front[m] else "" for m in table.index]
        if "tried" in part and (part["tried"] > 1).any():
            of_method = part.dropna(subset="tried").drop_duplicates("method").set_index("method")
            table["tried"] = of_method["tried"].astype(int).astype(str)
            table["taken"] = of_method["strength"]
        table.index.name = "method"
        print_frame(table, f"{budget} of ReLUs, against {baseline}", {"groups better": ".0f", "worse": ".0f"})
        if told := summary(frame, str(budget)):
            out_console.print(told, highlight=False)
    for sentence in [*undoing(frame), *kept_fewer(frame)]:
        out_console.print(sentence, highlight=False)
    if told := too_small(frame, run.config["split"]):
        out_console.print(told, soft_wrap=True, highlight=False)
    path = write_comparison(run.folder, within=within, critical=critical, found=found)
    out_console.print(f"Comparison: {path.resolve()}", soft_wrap=True)


def print_audit(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> None:
    """What may ship, who pays for each network, and accuracy by group."""
    from fairline.report import figures
    from fairline.report.html import judged
    from fairline.report.page import too_small
    from fairline.report.verdict import cautions, focus, headline

    everything, found = judged(run, within, critical)
    for variant in figures.main_variants(everything):
        _print_groups(everything, variant)
    if told := too_small(everything, run.config["split"]):
        out_console.print(told, soft_wrap=True, highlight=False)
    if not found:
        return
    _print_verdicts(found)
    chosen = focus(found)
    sentences = [] if chosen is None or chosen.is_control else [chosen.control_told(), chosen.saved_told()]
    for sentence in [headline(found), *sentences, *cautions(found)]:
        out_console.print(sentence, highlight=False)


def print_predicted(run: Run, within: float = 5.0, critical: Sequence[str] = ()) -> None:
    """Accuracy by group and class of predictions, and whether they may stand in place of the reference."""
    import pandas as pd

    from fairline.report.predicted import judge, rows_of, summary
    from fairline.report.verdict import reason

    frame = run.table("audit.parquet")
    judged = judge(run, within, critical)
    for column, share in (("group", "accuracy"), ("class", "recall")):
        rows = rows_of(frame, column)
        table = pd.DataFrame(
            [{"samples": row["n"], share: row["share"], "95 %": row["limits"]} for row in rows],
            index=pd.Index([row["who"] for row in rows], name=column),
        )
        if judged is not None:
            table["points"] = [row["change"] for row in rows]
            table["95 % "] = [row["change_limits"] for row in rows]
        print_frame(table, f"by {column}")
    out_console.print(summary(frame), highlight=False)
    if judged is not None:
        out_console.print(
            f"Within {within:g} points of the reference: {judged.answer}. {reason(judged)}", highlight=False
        )


#: Networks side by side in 80 columns.
_ABREAST = 4


def _print_groups(everything: pd.DataFrame, variant: str) -> None:
    """Accuracy by group of a variant's networks beside the base network, and what explains it."""
    from fairline.report import figures

    rows = figures.beside(everything, variant)
    accuracy = rows[rows["measure"] == "accuracy"]
    table = accuracy.pivot_table(index="group", columns="network", values="value", aggfunc="first", sort=False)
    table = table[figures.network_order(accuracy)]
    for start in range(0, len(table.columns), _ABREAST):
        part = table[table.columns[start : start + _ABREAST]]
        print_frame(part, f"accuracy by ReLUs kept: {variant}", dict.fromkeys(part, ".1%"))
    own = everything[everything["variant"] == variant]
    smallest = own[(own["percent"] == own["percent"].min()) & (own["class"] == "")]
    table = smallest.pivot_table(index="group", columns="measure", values="value", aggfunc="first", sort=False)
    shown = [name for name in EXPLAINED_BY if name in table]
    if shown:
        title = f"{smallest['budget'].iloc[0]} of ReLUs: {variant}"
        # Words wrap in a narrow terminal; names with underscores would be cut.
        words = table[shown].rename(columns=lambda name: name.replace("_", " "))
        print_frame(words, title, dict.fromkeys(words, ".4g"))


def _print_verdicts(found: Sequence[Candidate]) -> None:
    """A line a network: whether it may ship, who decides that, and what it saves."""
    from fairline.report.verdict import limits_told, named, signed

    table = Table(title=f"within {found[0].verdict.within:g} points of the base network", title_justify="left")
    points = [f"{signed(each.verdict.decisive['change'])}{limits_told(each.verdict.decisive)}" for each in found]
    table.add_column("network", overflow="fold")
    table.add_column("verdict", width=max(len(each.answer) for each in found))
    table.add_column("decided by", overflow="fold")
    table.add_column("points [95 %]", justify="right", width=max(map(len, [*points, "points [95 %]"])))
    known = any(each.costs for each in found)
    if known:
        table.add_column("WAN s saved", justify="right", overflow="fold")
    for each, change in zip(found, points, strict=True):
        saved = each.saved("seconds", "wan")
        cells = [each.name, each.answer, named(each.verdict.decisive), change]
        table.add_row(*cells, *([f"{saved:.0f} %" if saved == saved else ""] if known else []))
    out_console.print(table)


def print_compiled(table: pd.DataFrame, plan: pd.DataFrame) -> None:
    """What each network was compiled to, block by block, and how far it agrees with its original."""
    import pandas as pd

    from fairline.report.compiled import told

    for name, part in plan.groupby("network", sort=False):
        ends = [first if first == last else f"{first} … {last}" for first, last in part[["first", "last"]].to_numpy()]
        shown = part[["form", "levels", "relus", "weights"]].set_axis(["form", "levels", "ReLUs", "weights"], axis=1)
        for column, title, factor, digits in (
            ("bytes", "MB", 1e6, 2),
            ("rounds", "rounds", 1, 0),
            ("seconds", "s", 1, 3),
        ):
            pairs = part[[f"{column}_before", column]].to_numpy() / factor
            shown[title] = [f"{before:,.{digits}f} → {after:,.{digits}f}" for before, after in pairs]
        shown.index = pd.Index(ends, name="part")
        print_frame(shown, f"{name}: original → compiled, predicted", {"ReLUs": ",.0f", "weights": ",.0f"})
    for row in table.to_dict("records"):
        out_console.print(told(row), soft_wrap=True, highlight=False)
        if row["left_out"]:
            out_console.print(row["left_out"], soft_wrap=True, highlight=False)


def print_frontier(table: pd.DataFrame, network: str) -> None:
    """A frontier's tables, one a protocol, and its verdicts."""
    import pandas as pd

    from fairline.report.verdict import signed

    for name, part in table.groupby("protocol", sort=False):
        shown = pd.DataFrame(
            {
                "MB": part["bytes"] / 1e6,
                "rounds": part["rounds"],
                "s": part["seconds"],
                "overall": part["overall"],
                "worst": part["lowest"],
                "◆": part["on_bytes_front"].map({True: "◆", False: ""}),
            }
        ).set_axis(part["model"])
        shown.index.name = "network"
        formats = {"MB": ".2f", "rounds": ".0f", "s": ".2f", "overall": ".1%", "worst": ".1%"}
        print_frame(shown, f"{name} over {network}; worst of groups and classes; ◆: on the front of bytes", formats)
    own = table[table["answer"] != ""].drop_duplicates("model") if "answer" in table else table[:0]
    if len(own):
        points = [signed(-loss) for loss in own["largest_loss"]]
        shown = pd.DataFrame({"verdict": own["answer"], "decided by": own["loss_who"], "points": points})
        print_frame(shown.set_axis(pd.Index(own["model"], name="network")), "against the base network")
