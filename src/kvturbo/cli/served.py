"""Options and steps of `kvturbo eval --server`."""

from __future__ import annotations

import argparse
from typing import Any

from kvturbo.cli import common
from kvturbo.cli.errors import CommandFailed, bad_input
from kvturbo.eval.server import CONCURRENCY, TIMEOUT, TOP_LOGPROBS, Server, ServerError

_HERE: dict[str, Any] = {
    "formats": None,
    "plans": [],
    "plot": None,
    "recent": None,
    "sink": None,
    "device": "auto",
    "dtype": "auto",
}
_THERE: dict[str, Any] = {
    "reference": None, "served_model": None, "server_dtype": None, "server_chunk": None, "top_logprobs": TOP_LOGPROBS,
    "concurrency": CONCURRENCY, "timeout": TIMEOUT,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that are for servers only."""
    group = parser.add_argument_group("servers", "evaluation on vLLM servers; --model names the tokenizer's folder")
    group.add_argument("--server", metavar="URL", help="a vLLM server, such as http://localhost:8000")
    group.add_argument("--reference", metavar="URL", help="another one of the same model, with a 16-bit cache")
    group.add_argument("--served-model", metavar="NAME", help="the model's name there (default: the first)")
    group.add_argument(
        "--server-dtype", metavar="DTYPE", help="the server's --kv-cache-dtype, where its /metrics does not say"
    )
    group.add_argument(
        "--server-chunk",
        type=int,
        metavar="N",
        help="the --max-num-batched-tokens that servers were started with; the task text needs it",
    )
    group.add_argument(
        "--top-logprobs",
        type=int,
        default=TOP_LOGPROBS,
        metavar="K",
        help=f"likeliest tokens for the bound of the divergence, at most --max-logprobs (default: {TOP_LOGPROBS})",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        metavar="N",
        help=f"requests to a server at once (default: {CONCURRENCY})",
    )
    group.add_argument(
        "--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=f"of a request (default: {TIMEOUT:g})"
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError if options of the one way come with the other."""
    foreign, reason = (
        (_THERE, "needs --server") if arguments.server is None else (_HERE, "can't be given with --server")
    )
    for name, default in foreign.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} {reason}")
    if not 0 < arguments.timeout < float("inf"):
        raise ValueError(f"--timeout must be a number of seconds above 0, got {arguments.timeout:g}")


def task_options(arguments: argparse.Namespace) -> list[str]:
    """Options of tasks that follow from those of servers, as --set takes them."""
    asked = arguments.tasks is None or "text" in arguments.tasks
    return [f"text.chunk={arguments.server_chunk}"] if arguments.server_chunk is not None and asked else []


def evaluation(arguments: argparse.Namespace, tasks: dict[str, Any], asked: list[str]) -> Any:
    """The evaluation of servers, of `asked` tasks at least; rows of servers that were asked before stay in the results."""
    from kvturbo.eval.runner import Evaluation
    from kvturbo.eval.served_model import load_served

    try:
        with bad_input():
            served = load_served(
                arguments.model,
                _servers(arguments),
                text=arguments.text,
                chunk=arguments.server_chunk,
                top=arguments.top_logprobs,
                concurrency=arguments.concurrency,
            )
            tasks = common.tasks_that_run(tasks, served, asked)
            return Evaluation(served, tasks, served.specs, arguments.out, earlier=True)
    except ServerError as error:
        raise CommandFailed(str(error)) from error


def _servers(arguments: argparse.Namespace) -> list[Server]:
    model, timeout = arguments.served_model, arguments.timeout
    servers = [Server.connect(arguments.server, model, arguments.server_dtype, timeout=timeout)]
    if arguments.reference is not None:
        servers.append(Server.connect(arguments.reference, model, "auto", timeout=timeout))
    return servers
