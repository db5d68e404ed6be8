"""The command line: a subcommand, `--config FILE`, and Hydra overrides."""

import argparse
import errno
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_rec.config import load_config
from lit_rec.errors import UserError

COMMANDS = {
    "fit": "run the recipe: data, knowledge, rounds, final reranker, report; resumes where it was stopped",
    "validate": "measure the finished run's final reranker on the validation users",
    "test": "show the finished run's results on the test users",
    "predict": "rank candidate lists with the finished run's final reranker",
    "export": "write the finished run's models as folders that PEFT, transformers, Ollama or ONNX Runtime load",
    "validate-data": "tell what was understood of the data, and what is wrong with it; no model is needed",
    "show-config": "print the whole configuration after composition",
}
SEVERAL = {
    "sweep": "fit every combination of several values per key (key=a,b), each in a process of its own, then report",
    "report": "one table and one HTML page over several finished runs",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
EPILOG = """\
Overrides follow Hydra: key=value, group=choice, +key=value, ~key. Groups: data, llm, encoder, reranker.
Examples:
  python -m lit_rec fit --config configs/quickstart.yaml
  python -m lit_rec fit --config configs/rlrf_ml1m.yaml llm=smollm2_135m encoder=minilm data.root=/data/ml-1m
  reranker=prm
  python -m lit_rec sweep --config configs/quickstart.yaml policy.beta=0.01,0.1 seed=1,2,3
  python -m lit_rec report runs/quickstart runs/other --output both.html
Exit codes: 0 done, 1 a defect in lit_rec (with a traceback), 2 something you can mend, 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="lit_rec",
        description="LLM-enhanced recommendation on Lightning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--config", required=True, metavar="FILE", help="experiment, e.g. configs/quickstart.yaml")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
        if name == "fit":
            sub.add_argument("--fresh", action="store_true", help="start anew in this run folder; LLM answers are kept")
        if name == "predict":
            sub.add_argument("--input", metavar="FILE", help="parquet or CSV with user_id and item_id columns")
            sub.add_argument("--output", required=True, metavar="FILE", help="where the ranked lists go (parquet)")
        if name == "export":
            sub.add_argument("--output", required=True, metavar="FOLDER", help="where the models go")
            sub.add_argument("--merged", action="store_true", help="also the language model with its adapter merged in")
            sub.add_argument("--onnx", action="store_true", help="also the reranker as ONNX")
            sub.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    _add_several(commands)
    return top


def _add_several(commands: Any) -> None:
    """Add the commands that deal with several runs."""
    sub = commands.add_parser("sweep", help=SEVERAL["sweep"], description=SEVERAL["sweep"])
    sub.add_argument("--config", required=True, metavar="FILE", help="experiment, e.g. configs/quickstart.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=a,b", help="Hydra overrides, some with several values")
    sub.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at work at a time")
    sub.add_argument("--fresh", action="store_true", help="start anew in every run folder; LLM answers are kept")
    sub = commands.add_parser("report", help=SEVERAL["report"], description=SEVERAL["report"])
    sub.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, or of a sweep")
    sub.add_argument("--output", default="runs_report.html", metavar="FILE", help="the page (default: %(default)s)")
    sub.add_argument("--open", action="store_true", help="show the page in the browser")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when done, 2 for a mistake the user can mend (told in one message), 130 when interrupted.
    """
    args, unknown = parser().parse_known_args(argv)
    bad = [u for u in unknown if u.startswith("-") or "=" not in u or args.command == "report"]
    if bad:
        parser().error(f"unknown argument {bad[0]}")
    try:
        if args.command in SEVERAL:
            _prepare()
            return _several(args, unknown)
        cfg = load_config(args.config, [*args.overrides, *unknown])
        if args.command == "show-config":
            print(OmegaConf.to_yaml(cfg), end="")
            return 0
        _prepare()
        from lit_rec.run import commands

        commands.COMMANDS[args.command](cfg, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except Exception as error:
        if not _disk_trouble(error):
            raise
        print(f"error: {_disk(error)}", file=sys.stderr)
        return 2
    return 0


def _several(args: argparse.Namespace, unknown: Sequence[str]) -> int:
    """Run a command that deals with several runs; return its exit code."""
    if args.command == "sweep":
        from lit_rec.run.sweep import sweep

        return sweep(args.config, [*args.overrides, *unknown], jobs=args.jobs, fresh=args.fresh)
    from lit_rec.run.many_report import report_runs

    report_runs(args.runs, Path(args.output))
    if args.open and not webbrowser.open(Path(args.output).resolve().as_uri()):
        print(f"no browser could be started; open {args.output}", file=sys.stderr)
    return 0


def _disk_trouble(error: Exception) -> bool:
    """Whether a write failed for want of space or permission; some libraries only say so in words."""
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
        return True
    return "No space left on device" in str(error)


def _disk(error: Exception) -> UserError:
    number = getattr(error, "errno", None) or errno.ENOSPC
    cure = "free some space, or move" if number in FULL else "choose a folder you may write to for"
    return UserError(
        os.strerror(number),
        where=str(getattr(error, "filename", None) or "the run folder or the cache"),
        why="a file could not be written; nothing half-written is kept",
        fix=f"{cure} run.dir, run.answers or run.cache; the same command resumes",
    )


def _prepare() -> None:
    """Settings that must be in the environment before torch is imported."""
    # Threads that wait by spinning make every small operation ten times slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
