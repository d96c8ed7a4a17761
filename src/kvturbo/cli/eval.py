"""Measure a model with several caches: divergence, perplexity, retrieval; here or on vLLM servers.

Results go to a JSON file that is rewritten after every prompt. Run the same command again to continue an interrupted run,
or with more formats or tasks to add to it: the file has what the last command names, and what was measured before is taken
from the records beside it. An option of a task is set with --set TASK.OPTION=VALUE. Formats of other
projects, such as vllm-4bit_nc or kivi2, are simulated: their bytes are what they would take.

With --server the same questions go to a vLLM server with a packed cache, and with --reference to one with a 16-bit cache too;
or to one after the other with the same --out. The task text needs servers that were started with --max-num-batched-tokens N
--no-enable-prefix-caching, and --server-chunk N.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from kvturbo.cli import common, served
from kvturbo.cli.errors import bad_input
from kvturbo.cli.output import print_json
from kvturbo.eval.report import table

PLOTTED = ("text", "retrieval")
FORMATS = ("16bit", "k4v4", "k4v2", "k2v2")


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser)
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help=f"default: {' '.join(FORMATS)}")
    parser.add_argument(
        "--plans",
        nargs="+",
        default=[],
        type=Path,
        metavar="PATH",
        help="plans of kvturbo check or plan, measured as well",
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="default: all that the model has files for; --list shows them"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="TASK.OPTION=VALUE", help="may be given several times"
    )
    parser.add_argument("--list", action="store_true", help="list tasks with their options and defaults, and stop")
    parser.add_argument("--text", type=Path, metavar="PATH", help="the text to score (default: the held-out text)")
    parser.add_argument("--out", type=Path, default=Path("kvturbo-eval.json"), help="default: kvturbo-eval.json")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw divergence and retrieval against bytes per token"
    )
    common.add_window_options(parser)
    served.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list(arguments.json)
    with bad_input():
        served.check_options(arguments)
        tasks = build_tasks(
            arguments.tasks, served.task_options(arguments) + arguments.set, arguments.server is not None
        )
        if arguments.plot is not None:
            _check_plot(tasks, arguments.plot)
    common.check_writable(arguments.out, "--out")
    if arguments.text is not None:
        common.read_text(arguments.text)
    evaluation = _evaluation(arguments, tasks)
    results = common.run_evaluation(evaluation)
    if arguments.plot is not None:
        from kvturbo.eval.plot import tradeoff

        settings = results["settings"]
        tradeoff(plot_rows(results), arguments.plot, f"{settings['model']}, {settings['device']}")
    if arguments.json:
        print_json(results)
    else:
        print(_text(results))
        print(f"\nresults in {arguments.out}")
    return 0


def _evaluation(arguments: argparse.Namespace, tasks: dict[str, Any]) -> Any:
    if arguments.server is None:
        return _local(arguments, tasks)
    return served.evaluation(arguments, tasks, asked_for(arguments))


def _local(arguments: argparse.Namespace, tasks: dict[str, Any]) -> Any:
    """The evaluation of caches in this process."""
    from kvturbo.eval.caches import CacheSpec, check_name
    from kvturbo.eval.planning import PlanSpec
    from kvturbo.eval.runner import Evaluation

    with bad_input():
        names = dict.fromkeys(check_name(name) for name in arguments.formats or FORMATS)
        plans = [PlanSpec.read(path, arguments.recent, arguments.sink) for path in arguments.plans]
    loaded = common.load(arguments, arguments.text)
    specs = [*(CacheSpec(name, arguments.recent, arguments.sink) for name in names), *plans]
    with bad_input():
        for spec in specs:
            spec.new(loaded)
        return Evaluation(loaded, common.tasks_that_run(tasks, loaded, asked_for(arguments)), specs, arguments.out)


def asked_for(arguments: argparse.Namespace) -> list[str]:
    """Tasks that an option names; others are part of an evaluation only where the model can be asked."""
    return [
        *(arguments.tasks or ()),
        *(x.partition(".")[0] for x in arguments.set),
        *(PLOTTED if arguments.plot else ()),
    ]


def build_tasks(names: list[str] | None, settings: list[str], of_servers: bool = False) -> dict[str, Any]:
    """Tasks by name with their options set; those for servers if `of_servers`.

    Raises:
        ValueError: a task or an option is unknown, or a value does not fit; the message lists the choices.
    """
    from kvturbo.eval.registry import SERVED_TASKS, TASKS, Registry

    registry: Registry[Any] = SERVED_TASKS if of_servers else TASKS
    chosen = names or registry.names()
    options: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for setting in settings:
        task, option, value = _parse(setting)
        if task not in options:
            raise ValueError(f"--set {setting}: task must be one of {', '.join(options)}")
        options[task][option] = _convert(registry.get(task), option, value, setting)
    return {name: registry.get(name)(**options[name]) for name in chosen}


def plot_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What `kvturbo.eval.plot.tradeoff` draws, from the tasks `text` and `retrieval`."""
    text, retrieval = (results["tasks"][name] for name in PLOTTED)
    setting = retrieval["options"]["setting"]
    return [
        {"format": name, "bytes_per_token": figures["bytes_per_token"], "kl_mean": figures["kl_mean"]}
        | {"retrieval": {setting: retrieval["caches"][name]}}
        for name, figures in text["caches"].items()
    ]


def _check_plot(tasks: dict[str, Any], path: Path) -> None:
    missing = [name for name in PLOTTED if name not in tasks]
    if missing:
        raise ValueError(f"--plot needs the tasks {' and '.join(PLOTTED)}, missing: {', '.join(missing)}")
    known = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--plot must end in one of .{', .'.join(sorted(known))}, got {path}")
    common.check_writable(path, "--plot")


def _parse(setting: str) -> tuple[str, str, str]:
    target, equals, value = setting.partition("=")
    task, dot, option = target.partition(".")
    if not (equals and dot and task and option):
        raise ValueError(f"--set must be TASK.OPTION=VALUE, got {setting!r}")
    return task, option, value


def _convert(task: Any, option: str, value: str, setting: str) -> Any:
    defaults = _defaults(task)
    if option not in defaults:
        raise ValueError(f"--set {setting}: option must be one of {', '.join(defaults)}")
    kind: Callable[[str], Any] = type(defaults[option])
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"--set {setting}: {option} must be like {defaults[option]!r}, got {value!r}") from None


def _defaults(task: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(task)}


def _list(as_json: bool) -> int:
    from kvturbo.eval.registry import TASKS

    defaults = {name: _defaults(TASKS.get(name)) for name in TASKS.names()}
    if as_json:
        print_json(defaults)
        return 0
    for name, options in defaults.items():
        print(f"{name}: {(TASKS.get(name).__doc__ or '').strip().splitlines()[0]}")
        print("".join(f"  --set {name}.{option}={value}\n" for option, value in options.items()))
    return 0


def _text(results: dict[str, Any]) -> str:
    blocks = []
    for name, task in results["tasks"].items():
        rows_of = task["caches"].values()
        columns = list(
            dict.fromkeys(key for figures in rows_of for key, value in figures.items() if _shown(key, value))
        )
        rows = [
            (cache, *(_cell(figures.get(key, "-")) for key in columns)) for cache, figures in task["caches"].items()
        ]
        blocks.append(f"{name} {json.dumps(task['options'])}\n" + table(["cache", *columns], rows))
    return "\n\n".join(blocks)


def _shown(key: str, value: Any) -> bool:
    return key != "prompts" and not isinstance(value, list)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
