"""Commands on what a private inference costs."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fairline.cli.console import err_console, out_console, print_frame, progress_bars
from fairline.cli.options import CostProtocols, Out, Root, Seed, Wire, parse_counts, parse_names
from fairline.errors import FairlineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd


app = typer.Typer(
    no_args_is_help=True,
    help="What private inference costs: [bold]estimate[/] it, [bold]run[/] it between two processes, "
    "[bold]serve[/] and [bold]query[/] between two hosts.",
)
CheckpointSources = Annotated[
    list[Path],
    typer.Argument(metavar="CHECKPOINT...", help="Run folders, or folders of single networks (RUN/networks/NAME)."),
]
RunProtocols = Annotated[str, typer.Option("--protocol", help="Comma-separated: cheetah, semi2k.")]

RingBits = Annotated[int, typer.Option("--ring-bits", help="Of the ring that values are shared in: 64 or 128.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds without a word from the other party.")]
Parties = Annotated[
    Path, typer.Option("--parties", help="YAML file with the two addresses: 'model: HOST:PORT', 'image: HOST:PORT'.")
]


@app.command("run")
def private_run(
    sources: CheckpointSources,
    protocol: RunProtocols = "cheetah",
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder to write, or to resume; without it nothing is kept.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images, at random from the split.")] = 1,
    batch_sizes: Annotated[str, typer.Option(help="Images in a call, comma-separated.")] = "1",
    repeats: Annotated[int, typer.Option(help="Timed calls of each batch; their median is told.")] = 3,
    network: Wire = "loopback",
    ring_bits: RingBits = 64,
    fraction_bits: Annotated[int, typer.Option(help="Of the fixed-point form.")] = 18,
    split: Annotated[str, typer.Option(help="Part that the images come from.")] = "test",
    timeout: Timeout = 120,
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Run networks between two processes: one holds the weights, the other the images. Seconds, bytes, rounds, error.

    A demonstration around SPU 0.9.5 (extra mpc), not a hardened service: semi-honest parties, public architecture and
    masks. See docs/private.md.
    """
    import tempfile

    import pandas as pd

    from fairline.jobs.private import private_job

    protocols = parse_names(protocol)
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fairline-"))) / "run"
        with progress_bars() as progress:
            run = private_job(
                sources,
                folder,
                protocols=protocols,
                images=images,
                batch_sizes=parse_counts(batch_sizes, "Batch sizes"),
                repeats=repeats,
                network=network,
                ring_bits=ring_bits,
                fraction_bits=fraction_bits,
                split=split,
                timeout=timeout,
                root=None if root is None else str(root),
                seed=seed,
                progress=progress,
            )
        table = pd.read_parquet(run.folder / "private.parquet")
    _print_measurement(table, protocols)
    if out is not None:
        out_console.print(f"Tables: {run.folder.resolve()}", soft_wrap=True)


def _print_measurement(table: pd.DataFrame, protocols: Sequence[str]) -> None:
    import pandas as pd

    from fairline.private.plan import CAVEATS

    for (name, size), part in table.groupby(["protocol", "batch_size"], sort=False):
        shown = pd.DataFrame(
            {
                "ReLUs": part["relus"],
                "seconds": part["seconds"],
                "MB (predicted)": [
                    f"{found / 1e6:.2f} ({told / 1e6:.2f})"
                    for found, told in part[["bytes", "predicted_bytes"]].to_numpy()
                ],
                "rounds": part["rounds"],
                "error": part["max_abs_error"],
            }
        ).set_axis(part["network"])
        shown.index.name = "network"
        formats = {"ReLUs": ",.0f", "seconds": ".2f", "rounds": ".0f", "error": ".1e"}
        print_frame(shown, f"{name}, batch of {size}: one call", formats)
    out_console.print(f"Same class as in floating point: {table['agreement'].min():.1%} of the images, at least.")
    for name in protocols:
        first = table[table["protocol"] == name].iloc[0]
        out_console.print(
            f"{CAVEATS[name]} Setup once a session: {first['setup_seconds']:.1f} s, "
            f"{first['setup_bytes'] / 1e6:.1f} MB. Inside SPU: "
            f"{table.loc[table['protocol'] == name, 'engine_share'].min():.1%} of the time, at least.",
            soft_wrap=True,
            highlight=False,
        )


@app.command("estimate")
def private_estimate(
    sources: CheckpointSources,
    protocol: CostProtocols = "cheetah",
    network: Annotated[
        str, typer.Option(help="Between the parties, comma-separated: loopback, lan, wan, MBITS:MS.")
    ] = ("lan,wan"),
    batch_size: Annotated[int, typer.Option(help="Images in a call.")] = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
) -> None:
    """Predict what networks cost, without running them."""
    from fairline.jobs.private import estimate_networks
    from fairline.private.basis import PREDICTED
    from fairline.private.cost import PROTOCOL_COSTS
    from fairline.report.cost_parts import advice

    protocols = parse_names(protocol)
    with progress_bars() as progress:
        totals, by_layer = estimate_networks(sources, protocols, parse_names(network), batch_size, progress)
    for name, part in totals.groupby("protocol", sort=False):
        _print_parts(part, f"{name}, batch of {batch_size}: one call, and its parts")
    if layers:
        for (name, kind), part in by_layer.groupby(["network", "protocol"], sort=False):
            shown = part.set_index("layer")[["op", "relus", "bytes", "offline_bytes", "rounds"]]
            formats = {"relus": ",.0f", "bytes": ",.0f", "offline_bytes": ",.0f", "rounds": ".0f"}
            print_frame(shown, f"{name} on {kind}", formats)
    for sentence in advice(totals.rename(columns={"network": "model"}).assign(basis=PREDICTED)):
        out_console.print(sentence, soft_wrap=True, highlight=False, markup=False)
    for name in protocols:
        out_console.print(f"{name}: {PROTOCOL_COSTS[name].source}.", soft_wrap=True, highlight=False)


def _print_parts(totals: pd.DataFrame, title: str) -> None:
    """Each network's call, and under it the parts that it has; the setup is none of a call."""
    import pandas as pd

    from fairline.private.cost import PARTS
    from fairline.report.cost_parts import occurring

    names, rows = [], []
    for network, own in totals.groupby("network", sort=False):
        first = own.iloc[0]
        for part in ("", *occurring(own)):
            end = f"_{part}" if part else ""
            cells = {"ReLUs": math.nan if part else first["relus"], "MB": first[f"bytes{end}"] / 1e6}
            cells |= {
                "offline": math.nan if part else first["offline_bytes"] / 1e6,
                "rounds": first[f"rounds{end}"],
            }
            # A protocol whose computing no source tells has no seconds.
            for row in own.dropna(subset=["seconds"]).to_dict("records"):
                cells[f"{row['wire']} s"] = row[f"seconds{end}"]
            names.append(f"  {PARTS[part]}" if part else str(network))
            rows.append(cells)
    shown = pd.DataFrame(rows, index=pd.Index(names, name="network"))
    formats = {str(column): ".2f" for column in shown} | {"ReLUs": ",.0f", "rounds": ".0f"}
    print_frame(shown, title, formats)


@app.command("fixed-point")
def private_fixed_point(
    sources: CheckpointSources,
    out: Out,
    fraction_bits: Annotated[str, typer.Option(help="Of the fixed-point form, comma-separated.")] = "8,12,18",
    ring_bits: RingBits = 64,
    protocol: Annotated[
        str, typer.Option(help="ref2k (the same arithmetic in the clear), or cheetah or semi2k between two processes.")
    ] = "ref2k",
    samples: Annotated[int, typer.Option(help="Images of each group, at random; 0 for all.")] = 200,
    split: Annotated[str, typer.Option(help="Part that the images come from.")] = "test",
    root: Root = None,
    seed: Seed = 0,
) -> None:
    """Show whom fixed-point arithmetic hurts: agreement of private with plain predictions, by group."""
    import pandas as pd

    from fairline.jobs.private import fixed_point_job

    with progress_bars() as progress:
        run = fixed_point_job(
            sources,
            out,
            fraction_bits=parse_counts(fraction_bits, "Fraction bits"),
            ring_bits=ring_bits,
            protocol=protocol,
            samples=samples or None,
            split=split,
            root=None if root is None else str(root),
            seed=seed,
            progress=progress,
        )
    table = pd.read_parquet(run.folder / "fixed_point.parquet")
    table["cell"] = [
        f"{a:.1%} [{low:.0%}, {high:.0%}]" for a, low, high in table[["agreement", "low", "high"]].to_numpy()
    ]
    for name, part in table.groupby("network", sort=False):
        wide = part.pivot_table(index="group", columns="fraction_bits", values="cell", aggfunc="first", sort=False)
        print_frame(wide, f"{name}: same class as in floating point [95 % interval], by fraction bits")
    out_console.print(f"Table: {run.folder.resolve()}", soft_wrap=True)


@app.command("export")
def private_export(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of one network, or of a run with one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write network.onnx (extra onnx).")] = False,
    root: Root = None,
) -> None:
    """Write a network for private inference: a public folder for both parties, weights for its owner."""
    from fairline.jobs._common import data_of
    from fairline.jobs.private import export_network, find_networks

    found, run = find_networks([source])
    if len(found) != 1:
        names = ", ".join(checkpoint.folder.name for checkpoint in found)
        raise FairlineError(f"{source} holds {len(found)} networks ({names}); name the folder of one.")
    spec = data_of(run, None if root is None else str(root))
    graph = export_network(found[0], spec, out, onnx=onnx)
    out_console.print(
        f"{graph.relus:,} ReLUs are evaluated. For both parties: {out / 'public'}; "
        f"for the model's owner alone: {out / 'weights.safetensors'}",
        soft_wrap=True,
        highlight=False,
    )


@app.command("serve")
def private_serve(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="From 'fairline private export'.")],
    parties: Parties,
    sessions: Annotated[int, typer.Option(help="How many before it stops; 0 for no end.")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the image's owner.")] = 86_400,
    timeout: Timeout = 120,
) -> None:
    """Be the model's owner: answer queries with a network, one session after another."""
    from itertools import count

    from fairline.private.serve import load_addresses, serve
    from fairline.private.spu import SessionError, require_spu

    require_spu()
    addresses = load_addresses(parties)
    for session in count(1):
        err_console.print(f"Waiting at {addresses.model} for the image's owner ({addresses.image}).", highlight=False)
        try:
            serve(folder, addresses, wait=wait, timeout=timeout)
            out_console.print(f"Session {session} is done.", highlight=False)
        except SessionError as error:
            # One that broke off must not end the service, unless nothing is left to serve.
            if session == sessions:
                raise
            err_console.print(f"Session {session} failed: {error}", highlight=False, markup=False)
        if session == sessions:
            return


@app.command("query")
def private_query(
    public: Annotated[Path, typer.Argument(metavar="PUBLIC", help="Folder 'public' of 'fairline private export'.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    parties: Parties,
    protocol: Annotated[str, typer.Option(help="cheetah or semi2k.")] = "cheetah",
    wait: Annotated[float, typer.Option(help="Seconds to wait for the model's owner.")] = 60,
    timeout: Timeout = 120,
) -> None:
    """Be the image's owner: ask a network that another host holds for the classes of images it never sees."""
    from fairline.private.plan import CAVEATS
    from fairline.private.serve import load_addresses, query

    with progress_bars() as progress:
        answer = query(
            public, load_addresses(parties), images, protocol=protocol, wait=wait, timeout=timeout, progress=progress
        )
    for path, prediction, logits in zip(images, answer.predictions, answer.logits.tolist(), strict=True):
        values = ", ".join(f"{value:.3f}" for value in logits)
        out_console.print(f"{path}: {prediction} (logits {values})", soft_wrap=True, highlight=False, markup=False)
    out_console.print(
        f"{answer.seconds:.2f} s and {answer.bytes / 1e6:.2f} MB, after {answer.setup_seconds:.1f} s of setup. "
        f"{CAVEATS[protocol]}",
        soft_wrap=True,
        highlight=False,
    )
