# PYTHON_ARGCOMPLETE_OK
"""The command line: a subcommand, `--config FILE` or `--run RUN` (of a finished run both), and Hydra overrides."""

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rec import cores, distributed
from lit_rec.config import load_config, load_run, plain
from lit_rec.errors import FULL, UserError
from lit_rec.origins import groups, origins, render_origins
from lit_rec.run.claim import check_run_dir
from lit_rec.secrets import hide
from lit_rec.stopping import stoppable

COMMANDS = {
    "fit": "run the recipe: data, knowledge, rounds, final reranker, report; resumes where it was stopped",
    "validate": "measure the finished run's final reranker on the validation users",
    "test": "show the finished run's results on the test users",
    "predict": "rank candidate lists, or sessions, with the finished run",
    "export": "write the finished run's models as folders that PEFT, transformers, Ollama or ONNX Runtime load",
    "validate-data": "tell what was understood of the data, and what is wrong with it; no model is needed",
    "show-config": "print the whole configuration after composition",
}
INPUT = (
    "parquet or CSV with user_id and item_id columns; recipe re2llm: JSON lines with session and candidates, or a "
    "table with session_id, item_id, role"
)
HISTORY = "what users who are not in the data set have rated: user_id, item_id, rating, timestamp; parquet or CSV"
SEVERAL = {
    "sweep": "fit every combination of several values per key (key=a,b), each in a process of its own, then report",
    "report": "one table and one HTML page over several finished runs",
}
OF_FINISHED = ("validate", "test", "predict", "export")  # commands that serve a finished run
AT_WORK = ("fit", *OF_FINISHED)  # commands that a cluster runs: --quiet, --json
ENVIRONMENT = {
    # Large tensors in pages of their own: holes between small ones cost a DPO step on a CPU half as much memory again.
    "THP_MEM_ALLOC_ENABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
CODES = """\
Exit codes: 0 done, 1 a defect in lit_rec (with a traceback), 2 something you can mend, 130 interrupted, 143 stopped by
SIGTERM, 138 by SIGUSR1. After 128 and more the same command goes on."""
EXAMPLES = """\
Examples:
  python -m lit_rec fit --config configs/quickstart.yaml
  python -m lit_rec fit --config configs/rlrf_ml1m.yaml --fast-dev-run
  python -m lit_rec fit --config configs/rlrf_ml1m.yaml llm=smollm2_135m encoder=minilm data.root=/data/ml-1m
  reranker=prm
  python -m lit_rec test --run runs/quickstart
  python -m lit_rec predict --run runs/quickstart --input lists.csv --output ranked.parquet
  python -m lit_rec sweep --config configs/quickstart.yaml policy.beta=0.01,0.1 seed=1,2,3
  python -m lit_rec report runs/quickstart runs/other --output both.html
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(
        prog="lit_rec",
        description="LLM-enhanced recommendation on Lightning.",
        epilog=f"{_overrides_help()}{EXAMPLES}{CODES}",
        **raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw["epilog"] = f"{_overrides_help()}{CODES}"
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, **raw)
        _add_config(sub, "key=value", run=name != "validate-data", both=name in OF_FINISHED)
        if name == "fit":
            sub.add_argument("--fresh", action="store_true", help="start anew in this run folder; LLM answers are kept")
            sub.add_argument(
                "--fast-dev-run", action="store_true", help="the whole recipe on a handful, anew, in the folder RUN-dev"
            )
        if name == "predict":
            sub.add_argument("--input", metavar="FILE", help=INPUT)
            sub.add_argument("--history", metavar="FILE", help=HISTORY)
            sub.add_argument(
                "--output", required=True, metavar="FILE", help="where the ranked lists go: FILE.parquet, or .csv"
            )
        if name == "export":
            sub.add_argument("--output", required=True, metavar="FOLDER", help="where the models go")
            sub.add_argument("--merged", action="store_true", help="also the language model with its adapter merged in")
            sub.add_argument("--onnx", action="store_true", help="also the reranker as ONNX")
            sub.add_argument("--overwrite", action="store_true", help="replace an earlier export")
        if name == "show-config":
            sub.add_argument("--origins", action="store_true", help="every key with where its value comes from")
        if name in AT_WORK:
            told = sub.add_mutually_exclusive_group()
            told.add_argument("--quiet", action="store_true", help="say errors, warnings and the final table alone")
            told.add_argument("--json", action="store_true", help="a JSON object per line, for every step and the end")
    _add_several(commands, raw)
    return top


def _overrides_help() -> str:
    """What may follow the options: the groups are those of the shipped configs."""
    listed = "\n".join(f"  {group}={'|'.join(choices)}" for group, choices in groups().items())
    return f"Overrides follow Hydra: key=value, group=choice, +key=value, ~key. Groups and their choices:\n{listed}\n"


def _add_config(sub: argparse.ArgumentParser, metavar: str, *, run: bool = False, both: bool = False) -> None:
    """Add what names a configuration: an experiment, or a run folder, or both."""
    source: Any = sub.add_mutually_exclusive_group(required=True) if run and not both else sub
    more: dict[str, Any] = {} if run else {"required": True}
    named = source.add_argument("--config", metavar="FILE", help="experiment, e.g. configs/quickstart.yaml", **more)
    named.completer = _yaml_files
    if run:
        told = "run folder: with the configuration it was made with"
        also = "; a --config beside it has to describe the same run" if both else ""
        source.add_argument("--run", metavar="RUN", help=f"{told}{also}")
    given: Any = sub.add_argument("overrides", nargs="*", metavar=metavar, help="Hydra overrides")
    given.completer = _choices


def _add_several(commands: Any, raw: dict[str, Any]) -> None:
    """Add the commands that deal with several runs."""
    sub = commands.add_parser("sweep", help=SEVERAL["sweep"], description=SEVERAL["sweep"], **raw)
    _add_config(sub, "key=a,b")
    sub.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at work at a time")
    sub.add_argument("--fresh", action="store_true", help="start anew in every run folder; LLM answers are kept")
    raw = {**raw, "epilog": CODES}
    sub = commands.add_parser("report", help=SEVERAL["report"], description=SEVERAL["report"], **raw)
    told = "folder of a finished run, or of a sweep; none: the newest run below runs/, with the report that it has"
    sub.add_argument("runs", nargs="*", metavar="RUN", help=told)
    sub.add_argument("--output", default="runs_report.html", metavar="FILE", help="the page (default: %(default)s)")
    sub.add_argument("--open", action="store_true", help="show the page in the browser")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _yaml_files(prefix: str, **_: Any) -> list[str]:
    """Completions of --config: folders and .yaml files."""
    from argcomplete.completers import FilesCompleter

    return FilesCompleter(("yaml",))(prefix)


def _choices(prefix: str, **_: Any) -> list[str]:
    """Completions of an override: every `group=choice`."""
    return [f"{group}={choice}" for group, choices in groups().items() for choice in choices]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when done, 2 for a mistake the user can mend (told in one message), 130 when interrupted, 143 when stopped by
        SIGTERM, 138 by SIGUSR1; with --json 1 for a defect, which is raised otherwise.
    """
    argv = sys.argv[1:] if argv is None else argv
    top = parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(top)
    args, unknown = top.parse_known_args(argv)
    bad = [u for u in unknown if u.startswith("-") or "=" not in u or args.command == "report"]
    if bad:
        top.error(f"unknown argument {bad[0]}")
    if args.command in OF_FINISHED and args.config is None and args.run is None:
        top.error("one of the arguments --config --run is required")
    as_json = getattr(args, "json", False)
    with stoppable() as stop:
        try:
            if args.command != "fit" and (place := distributed.discover()) and place.rank:
                who = f"process 0 of {place.size}, and this is process {place.rank}"
                print(f"`{args.command}` is left to {who}", file=sys.stderr)
                return 0
            return _several(args, unknown) if args.command in SEVERAL else _one(args, [*args.overrides, *unknown], argv)
        except BaseException as error:
            if stop.number is None and not isinstance(error, KeyboardInterrupt):
                if not isinstance(error, Exception):
                    raise
                return _failed(error, as_json)
    told = {"event": "interrupted", "message": str(stop), "code": stop.code}
    print(json.dumps(told) if as_json else stop, file=sys.stderr)
    return stop.code


def _failed(error: Exception, as_json: bool) -> int:
    """Say what went wrong; return the exit code. A defect is raised, unless it is told as JSON."""
    if isinstance(error, UserError):
        return _tell(error, as_json)
    if lost := _lost(error):
        print(lost, file=sys.stderr)
        return 1
    if _disk_trouble(error):
        return _tell(_disk(error), as_json)
    if not as_json:
        raise error
    defect = {"event": "error", "code": 1, "what": repr(error), "traceback": hide(traceback.format_exc())}
    print(json.dumps(defect), file=sys.stderr)
    return 1


def _tell(error: UserError, as_json: bool) -> int:
    """Say what the user can mend; return the exit code."""
    parts = {name: getattr(error, name) for name in ("what", "where", "why", "fix")}
    print(json.dumps({"event": "error", "code": 2, **parts}) if as_json else f"error: {error}", file=sys.stderr)
    return 2


def _one(args: argparse.Namespace, overrides: list[str], argv: Sequence[str]) -> int:
    """Run a command that deals with one configuration; return its exit code."""
    cfg, overrides, said = _configuration(args, overrides)
    if args.command == "show-config":
        if args.origins:
            print(render_origins(origins(cfg, overrides, config=args.config, run=args.run)), end="")
        else:
            print(OmegaConf.to_yaml(cfg), end="")
        return 0
    prepare(cfg.trainer.threads)
    if args.command == "fit":
        place = distributed.discover()
        if place is None and cfg.trainer.devices != 1:
            from lit_rec.run.launch import devices_here, launch

            if (count := devices_here(cfg.trainer.devices)) > 1:
                check_run_dir(Path(cfg.run.dir))
                return launch(argv, Path(cfg.run.dir), count)
        distributed.check(place, cfg.trainer.devices)
        distributed.start(place)
    from lit_rec.data.assets import caching
    from lit_rec.run import commands
    from lit_rec.run.progress import ALL, JSON, QUIET, console, shown_as

    quiet, as_json = (getattr(args, name, False) for name in ("quiet", "json"))
    with caching(cfg.run.cache), shown_as(JSON if as_json else QUIET if quiet else ALL):
        if said:
            console.print(said, highlight=False)
        commands.COMMANDS[args.command](cfg, args)
        if not console.ended:
            console.emit("results", command=args.command, run=cfg.run.dir, output=getattr(args, "output", None))
    return 0


def _configuration(args: argparse.Namespace, overrides: list[str]) -> tuple[DictConfig, list[str], str]:
    """The configuration, all overrides, and what a fast dev run says before it begins."""
    run = getattr(args, "run", None)

    def load(given: Sequence[str]) -> DictConfig:
        if run is None:
            return load_config(args.config, given)
        made = load_run(run, given)
        if args.config is not None:
            from lit_rec.run.differing import check_same

            check_same(plain(made), plain(load_config(args.config, given)), run, args.config)
        if given and args.command in OF_FINISHED:
            from lit_rec.run.differing import check_overrides

            check_overrides(plain(load_run(run)), plain(made), run)
        return made

    cfg = load(overrides)
    if not getattr(args, "fast_dev_run", False):
        return cfg, overrides, ""
    from lit_rec.run.dev_run import own_folder, shrinking

    small = shrinking(cfg)
    cfg = own_folder(load([*small, *overrides]))
    args.fresh = True  # what an earlier one left may be of another configuration
    return (
        cfg,
        [*small, *overrides],
        f"[yellow]fast dev run[/] in {cfg.run.dir}: its numbers say nothing. {' '.join(small)}",
    )


def _several(args: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Run a command that deals with several runs; return its exit code."""
    prepare(1)  # the fits of a sweep see to themselves
    if args.command == "sweep":
        from lit_rec.run.sweep import sweep

        return sweep(args.config, [*args.overrides, *unknown], jobs=args.jobs, fresh=args.fresh)
    if args.runs:
        from lit_rec.run.many_report import report_runs

        page = Path(args.output)
        _check_page(page)
        report_runs(args.runs, page)
    else:
        page = _newest_report()
        print(f"Report: {page}")
    if not args.open:
        return 0
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        print(f"no browser could be started; open {page}", file=sys.stderr)
    return 0


def _check_page(page: Path) -> None:
    """Refuse to write the report of several runs over something else."""
    if page.suffix not in (".html", ".htm") and not page.is_dir():
        raise UserError(f"{page} is no page", where="--output", fix=f"name it {page.stem or 'runs_report'}.html")
    if page.name == "report.html" and (page.parent / "results.json").is_file():
        fix = f"name another file, such as {page.with_name('runs_report.html')}"
        raise UserError(f"{page} is the report that `fit` wrote of this run", where="--output", fix=fix)


def _lost(error: Exception) -> str:
    """What to say where this process is one of several and another one has gone; "" where that is not the trouble."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not any(text in str(error) for text in gone):
        return ""
    return (
        f"process {os.environ.get('RANK')} stops: another process of the run has ended ({str(error).splitlines()[0]})"
    )


def _newest_report() -> Path:
    """The report of the run below runs/ that was finished last."""
    pages = sorted(Path("runs").glob("*/report.html"), key=lambda page: page.stat().st_mtime)
    if not pages:
        raise UserError("no run below runs/ is finished", where="RUN", fix="name the folder of a finished run")
    return pages[-1]


def _disk_trouble(error: Exception) -> bool:
    """Whether a write failed for want of space or permission; some libraries only say so in words."""
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return True
    return any(said in str(error) for said in ("No space left on device", "inline_container"))  # the second: torch.save


def _disk(error: Exception) -> UserError:
    number = getattr(error, "errno", None) or errno.ENOSPC
    place = getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EPERM) and isinstance(place, str) and not _readable(place):
        why, fix = "it may not be read", "get the permission to read it, or name another place"
        return UserError(os.strerror(number), where=place, why=why, fix=fix)
    cure = "free some space, or move" if number in FULL else "choose a folder you may write to for"
    return UserError(
        os.strerror(number),
        where=str(place or "the run folder or the cache"),
        why="a file could not be written; nothing half-written is kept",
        fix=f"{cure} run.dir, run.answers or run.cache; the same command resumes",
    )


def _readable(place: str) -> bool:
    """Whether this user may look at what is there, or into the folder where something would be."""
    return os.access(place, os.R_OK) if os.path.exists(place) else os.access(os.path.dirname(place) or ".", os.X_OK)


def prepare(threads: int | None) -> None:
    """Settings that must be in the environment before torch is imported.

    Args:
        threads: How many are going to compute; None: as many as OpenMP starts.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    count = threads or (int(asked) if asked.isdigit() else cores.usable())
    if count > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) and not cores.free(count):
        # Threads that wait for each other by spinning, as OpenMP's do, are twice as fast as sleeping ones while each
        # has a core, and half as fast where another process wants one. What they compute is the same.
        os.environ["OMP_WAIT_POLICY"] = "passive"
