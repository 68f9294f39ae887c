"""``lambdascale serve``: a live cluster on this machine behind an OpenAI-compatible front end."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lambdascale.core import ClusterSpec, UserError, parse_rate, parse_size
from lambdascale.live.forkserver import prepare
from lambdascale.live.serving.options import KEY_VARIABLE, HttpOptions, bind, read_keys

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from omegaconf import DictConfig

    from lambdascale.checkpoints import PackedModel
    from lambdascale.control import SystemConfig
    from lambdascale.live.config import LiveConfig

# Rates and memory that limit nothing. A GPU's memory does: the smallest's, if this machine has any.
_FAST, _PLENTY = "1TB/s", "1TiB"


def add_parser(subcommands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the subcommand."""
    parser = subcommands.add_parser(
        "serve",
        help="serve a model from a cluster of processes that grows and shrinks with the load",
        description="Start node processes on this machine and an HTTP server with OpenAI's completions and chat completions. "
        "The cluster scales from --min-nodes to --nodes under load and back. Also: /v1/models, /health (it is alive), /ready "
        "(the model is served), /metrics (Prometheus), /cluster (JSON), /openapi.json.",
    )
    parser.add_argument(
        "--model", default="smollm2", metavar="DIR", help="a packed model, or smollm2, small, tiny (default: %(default)s)"
    )
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--min-nodes", type=int, default=1, metavar="N", help="replicas kept at all times (default: %(default)s)")
    parser.add_argument(
        "--system",
        default="lambdascale",
        metavar="SYSTEM",
        help="a name of conf/system (lambdascale, faasnet, nccl_broadcast, serverlessllm, ideal, ...), or a YAML file of a "
        "system (default: %(default)s)",
    )
    parser.add_argument(
        "--transport",
        choices=("shm", "tcp", "rdma", "cuda_ipc"),
        default="shm",
        help="cuda_ipc: between the GPUs of this host, with --device cuda (default: %(default)s)",
    )
    parser.add_argument(
        "--collective",
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="library of --system nccl_broadcast; auto: nccl if every node has a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--rdma-device",
        action="append",
        default=[],
        metavar="NAME",
        help="for --transport rdma, e.g. mlx5_0; several make rails (default: the fastest)",
    )
    parser.add_argument("--rdma-port", type=int, metavar="N", help="port of the device (default: the active one)")
    parser.add_argument(
        "--rdma-gid-index", type=int, metavar="N", help="GID of the port (default: a RoCE v2 one with an IP address)"
    )
    parser.add_argument("--rdma-mtu", type=int, metavar="BYTES", help="packet size (default: the largest of the port's link)")
    parser.add_argument(
        "--rdma-gpudirect",
        choices=("off", "dmabuf", "peermem"),
        default="off",
        help="with --device cuda, have NICs write to the GPUs' memory, not to the host's (default: %(default)s)",
    )
    parser.add_argument("--link", metavar="RATE", help="limit every node's link to this rate, e.g. 200MB/s (default: no limit)")
    parser.add_argument("--disk", metavar="RATE", help="limit every node's disk to this rate (default: no limit)")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="type of a built-in model (default: bf16)")
    parser.add_argument("--blocks", type=int, metavar="B", help="blocks of a built-in model (default: 16)")
    parser.add_argument(
        "--slot-tokens", type=int, default=1024, metavar="N", help="most tokens of prompt and answer (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-alive", type=float, default=10.0, metavar="S", help="time until idle replicas are released (default: %(default)s)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=5,
        metavar="N",
        help="times within ten minutes that a lost node is started again (default: %(default)s)",
    )
    parser.add_argument(
        "--spares",
        type=int,
        default=0,
        metavar="N",
        help="number of processes kept ready for each GPU, with a CUDA context, for restarted nodes (default: %(default)s)",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="when the server is stopped, write what it served as a run, which export, calibrate and workload=run read",
    )
    parser.add_argument(
        "--record-requests",
        type=int,
        default=100_000,
        metavar="N",
        help="requests to record, the first ones: each takes about 1 kB of memory until the end (default: %(default)s)",
    )
    _add_http(parser)
    parser.add_argument("--no-view", action="store_true", help="do not draw the cluster on the terminal")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the system, e.g. system.start.sources=2")
    parser.set_defaults(run=run)


def _add_http(parser: argparse.ArgumentParser) -> None:
    """Register the options of the HTTP server; their defaults are those of HttpOptions."""
    http = parser.add_argument_group("HTTP", "where the server listens, whom it answers, and how much it takes on")

    def add(option: str, metavar: str, kind: Callable[[str], object], text: str, default: str = "%(default)s") -> None:
        preset = getattr(HttpOptions, option[2:].replace("-", "_"))
        http.add_argument(option, type=kind, default=preset, metavar=metavar, help=f"{text} (default: {default})")

    add("--host", "ADDRESS", str, "where to listen")
    add("--port", "N", int, "where to listen")
    add("--queue-requests", "N", int, "prompts that wait at a time; beyond it: 429")
    quarter = "a quarter of --queue-requests times --slot-tokens"
    add("--queue-tokens", "N", int, "tokens of waiting prompts and of their answers", quarter)
    add("--client-share", "PART", float, "part of the queue that one API key, or else one address, may take, 0 to 1")
    add("--max-prompts", "N", int, "prompts in one request")
    add("--request-timeout-s", "S", float, "seconds until a prompt has its first token, and each next one; then: 504")
    add("--receive-timeout-s", "S", float, "seconds until a request has come whole; then: 408")
    add("--send-timeout-s", "S", float, "seconds until a client reads on; then its connection is closed")
    add("--connections", "N", int, "connections open at a time")
    http.add_argument(
        "--api-key",
        metavar="KEY",
        help="clients need it (Authorization: Bearer KEY), but for /health and /ready. @FILE: one key a line. Other users of "
        f"this machine see a key that is given here: rather use @FILE, or {KEY_VARIABLE} in the environment (default: no key)",
    )
    http.add_argument("--tls-cert", metavar="FILE", help="certificate and its chain, PEM: serve https (default: http)")
    http.add_argument("--tls-key", metavar="FILE", help="the certificate's private key, PEM, not encrypted")
    http.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="sites whose pages may use the server, e.g. https://example.org, or * for all; repeatable (default: none)",
    )
    http.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="names, besides localhost, this machine's and --host, that Host headers may have, or * for all; repeatable. "
        "Addresses always may (default: none)",
    )


def _http(arguments: argparse.Namespace) -> HttpOptions:
    """Return the options of the HTTP server; UserError for values out of range."""
    given = {field.name: getattr(arguments, field.name) for field in fields(HttpOptions) if hasattr(arguments, field.name)}
    keys = read_keys(arguments.api_key)
    options = HttpOptions(
        **given, api_keys=keys, cors_origins=tuple(arguments.cors_origin), allowed_hosts=tuple(arguments.allowed_host)
    )
    options.tls()  # a mistake shows now, and not when the nodes run
    return options


def run(arguments: argparse.Namespace) -> int:
    """Start everything and serve."""
    _check(arguments)
    options = _http(arguments)
    with bind(options) as bound:
        return _serve(arguments, options, bound)


def _serve(arguments: argparse.Namespace, options: HttpOptions, bound: socket.socket) -> int:
    if arguments.launcher == "local":
        prepare()  # the nodes import modules while this process does
    _check_rdma(arguments)
    # torch takes seconds to import: only here.
    from lambdascale.checkpoints.builtin import open_model
    from lambdascale.live.config import LiveConfig
    from lambdascale.live.serving.server import Service, serve
    from lambdascale.transport.rdma import RdmaOptions

    console = Console(stderr=True)
    config = LiveConfig(
        checkpoint=arguments.model,
        dtype=arguments.dtype or "bf16",
        launcher=arguments.launcher,
        transport=arguments.transport,
        rdma=RdmaOptions(
            devices=tuple(arguments.rdma_device),
            port=arguments.rdma_port,
            gid_index=arguments.rdma_gid_index,
            mtu=arguments.rdma_mtu,
            gpudirect=arguments.rdma_gpudirect,
        ),
        device=arguments.device,
        collective=arguments.collective,
        slot_tokens=arguments.slot_tokens,
        restarts=arguments.restarts,
        spares=arguments.spares,
        paced=arguments.link is not None or arguments.disk is not None,
    )
    with console.status("starting the nodes ..."):
        model = open_model(arguments.model, arguments.blocks, arguments.dtype)
        cluster, system = _cluster(arguments), _system(arguments, len(model.blocks))
        record = None if arguments.record is None else Record(arguments, config, model, len(model.blocks))
        observers = [] if record is None else [record.session]
        service = Service(config=config, model=model, cluster=cluster, system=system, options=options, observers=observers)
    ready = f"ready: {model.name} on {arguments.nodes} nodes at {options.url}/v1 (Ctrl-C stops)"
    if options.open_to_strangers:
        console.print(
            f"warning: anybody who can reach {options.host} may use this server: --api-key asks for a key", style="bold"
        )

    def announce() -> None:
        console.print(ready, highlight=False)

    status = serve(service, options, bound, view=not arguments.no_view, on_ready=announce)
    if record is not None:
        if status:
            raise UserError(f"the server has failed: {arguments.record} is not written")
        console.print(record.write(), highlight=False)
    return status


class Record:
    """The record of a session for ``--record``, and the configuration that the run has in place of the command's options."""

    def __init__(self, arguments: argparse.Namespace, config: LiveConfig, model: PackedModel, blocks: int) -> None:
        from lambdascale.metrics.session import SessionRecorder

        self.session = SessionRecorder(arguments.record_requests)
        self._folder: Path = arguments.record
        self._config = _as_run(arguments, config, model.name, blocks)
        self._started, self._begin = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()

    def write(self) -> str:
        """Write the run; return what to say of it. UserError without a request, or if the folder exists meanwhile."""
        from lambdascale.experiments.runner import write_session

        wall_s = time.perf_counter() - self._begin
        write_session(self._config, self.session, self._folder, started=self._started, wall_s=wall_s)
        more = f"; {self.session.left_out} later ones are not in it" if self.session.left_out else ""
        return f"wrote {self._folder}: {self.session.taken} requests{more}"


def _as_run(arguments: argparse.Namespace, config: LiveConfig, model: str, blocks: int) -> DictConfig:
    """Return the configuration of a run on the same cluster, system and backend."""
    from omegaconf import OmegaConf, open_dict

    from lambdascale.experiments.compose import choosing, compose

    with choosing("system", arguments.system) as chosen:
        run = compose([*chosen, "backend=live", "name=serve", *_settings(arguments), *arguments.overrides])
    with open_dict(run):
        run.model.name, run.system.blocks, run.out = model, blocks, str(arguments.record)
        for group, changes in (("cluster", _rates(arguments)), ("cluster.gpu", {"memory_bytes": _gpu_bytes(arguments)})):
            for name, value in changes.items():
                OmegaConf.update(run, f"{group}.{name}", value)
        for field in fields(config):
            if field.name != "rdma":
                run.backend[field.name] = getattr(config, field.name)
        for field in fields(config.rdma):
            run.backend.rdma[field.name] = getattr(config.rdma, field.name)
    return run


def _check(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.nodes <= 256:
        raise UserError(f"--nodes must be between 1 and 256, not {arguments.nodes}")
    if not 0 <= arguments.min_nodes <= arguments.nodes:
        raise UserError(f"--min-nodes must be between 0 and {arguments.nodes}, not {arguments.min_nodes}")
    if arguments.restarts < 0:
        raise UserError(f"--restarts must not be negative, not {arguments.restarts}")
    if arguments.record is not None:
        _check_place(arguments.record)
    if arguments.record_requests < 1:
        raise UserError(f"--record-requests must be at least 1, not {arguments.record_requests}")
    if arguments.keep_alive < 0:
        raise UserError(f"--keep-alive must not be negative, not {arguments.keep_alive}")
    for rate in (arguments.link, arguments.disk):
        if rate is not None and parse_rate(rate) <= 0:
            raise UserError(f"a rate must be positive, not {rate}")


def _check_place(folder: Path) -> None:
    """Raise UserError unless a run can be written to ``folder``: now, and not when a session has been served."""
    if folder.exists():
        raise UserError(f"--record: {folder} exists; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--record: cannot write {folder}: {error.strerror}") from error
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"--record: cannot write {folder}: no permission")


def _check_rdma(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option of a transport that is not chosen."""
    given = {"device": arguments.rdma_device, "port": arguments.rdma_port, "gid-index": arguments.rdma_gid_index}
    given |= {"mtu": arguments.rdma_mtu, "gpudirect": arguments.rdma_gpudirect != "off"}
    unread = [f"--rdma-{name}" for name, value in given.items() if value not in (None, [], False)]
    if unread and arguments.transport != "rdma":
        raise UserError(f"{unread[0]} needs --transport rdma, not {arguments.transport}")


def _cluster(arguments: argparse.Namespace) -> ClusterSpec:
    """Return the cluster «desk» with the user's rates; a rate that is not given is not limited."""
    from hydra.utils import instantiate

    from lambdascale.experiments.compose import compose

    cluster = instantiate(compose(["cluster=desk"]).cluster, _convert_="all")
    changed: ClusterSpec = replace(cluster, gpu=replace(cluster.gpu, memory_bytes=_gpu_bytes(arguments)), **_rates(arguments))
    return changed


def _gpu_bytes(arguments: argparse.Namespace) -> int:
    """Return the memory of a node's GPU. Not limited for nodes on CPUs, and on other machines than this one."""
    from lambdascale.transport.cuda import gpu_sizes

    sizes = gpu_sizes() if arguments.device == "cuda" and arguments.launcher == "local" else []
    return min(sizes, default=parse_size(_PLENTY))


def _rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what differs from the cluster «desk» besides the memory of its GPUs."""
    return {
        "nodes": arguments.nodes,
        "nic_bytes_per_s": arguments.link or _FAST,
        "ssd_bytes_per_s": arguments.disk or _FAST,
        "pcie_bytes_per_s": _FAST,
        "host_memory_bytes": _PLENTY,
    }


def _settings(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides of a system that options stand for."""
    return [f"system.autoscaler.min_replicas={arguments.min_nodes}", f"system.autoscaler.keep_alive_s={arguments.keep_alive}"]


def _system(arguments: argparse.Namespace, blocks: int) -> SystemConfig:
    from lambdascale.control import SystemConfig
    from lambdascale.experiments.build import build
    from lambdascale.experiments.compose import choosing, compose

    with choosing("system", arguments.system) as chosen:
        missing = [key for key in ("_target_", "autoscaler") if key not in compose(chosen).system]
        if missing:
            raise UserError(f"{arguments.system} is not a system: it has no {missing[0]}")
        system = build(compose([*chosen, *_settings(arguments), *arguments.overrides])).system
    assert isinstance(system, SystemConfig), "what is composed is a system"
    return replace(system, blocks=blocks)
