"""The Ray Serve application: an ingress that speaks HTTP, and a deployment of engine replicas for every model.

    client --HTTP--> Ingress: uvicorn, create_app(RayBackend) --Serve handle, channel--> EngineReplica (tp x pp ranks)

The ingress listens itself. Serve's own proxy costs 8 ms a request in front of it and HAProxy 2 ms (measured here, on
two busy cores: first token after 16, 5 and 3 ms through proxy and handle, HAProxy and gRPC handle, and as it is now),
and HAProxy opens its statistics to every interface. The ingress is a Serve ingress nevertheless: where a cluster runs
proxies (`serve run`, KubeRay's RayService), `build(..., listen=False)` answers behind them. Rejected: engines inside
the ingress process, which would save one hop and lose scaling to zero, several models, routing, and an engine its GIL.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from raytron.actors import Session
from raytron.actors.replica import bundles, start_engine
from raytron.actors.trainer import resources
from raytron.config import EngineConfig, ReplicaConfig, ScalingConfig, ServeConfig, ServingConfig, from_dict
from raytron.inference import Engine
from raytron.inference.launch import check_layout
from raytron.serving.backend import ModelCard
from raytron.serving.channel import Mailbox
from raytron.serving.http import Server
from raytron.serving.remote import RayBackend, Source
from raytron.serving.replica import EngineReplica
from raytron.serving.server import create_app

__all__ = ["App", "ServedModel", "ask_once", "build", "from_args", "run", "serve_until_stopped"]

log = logging.getLogger("raytron.serving")
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
HEALTH_S, HEALTH_TIMEOUT_S = 2.0, 60.0
READY_S = 60.0  # for the ingress to hear of the replicas
HEAD = "node:__internal_head__"  # a resource that Ray gives to its head node
ANY = 1_000_000  # Serve's limit of requests at a replica; the engine's own queue is the one that refuses
Start = Callable[[EngineConfig, Mapping[str, float]], Engine]


@dataclass(frozen=True)
class ServedModel:
    """A model to serve: what requests call it, its engine, and how many of them."""

    name: str
    engine: EngineConfig
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)

    @property
    def each(self) -> dict[str, float]:
        """What one rank reserves, by Ray's names."""
        given = self.replicas.resources or {"CPU": float(self.engine.threads or 1)}
        return resources(ScalingConfig(resources_per_worker=given, use_gpu=self.replicas.use_gpu))

    @property
    def slots(self) -> int:
        """CPU slots that all of its replicas take."""
        return math.ceil(self.each.get("CPU", 0) * self.engine.tp * self.engine.pp * self.replicas.max_replicas)

    def card(self) -> ModelCard:
        """What is known of it before a replica is up. Raises ValueError for a directory without a model."""
        path = Path(self.engine.path, "config.json")
        if not path.is_file():
            raise ValueError(f"{self.engine.path}: no model (config.json) there")
        longest = int(json.loads(path.read_text()).get("max_position_embeddings") or 2048)
        return ModelCard(self.name, self.engine.path, min(longest, self.engine.max_model_len or longest))


def build(
    models: Sequence[ServedModel],
    config: ServeConfig | None = None,
    *,
    listen: bool = True,
    start: Start = start_engine,
) -> serve.Application:
    """The application, for `serve.run`.

    Args:
        models: at least one, their names all different.
        config: what faces the network.
        listen: the ingress listens at config.host and port itself; otherwise only Serve's proxies reach it.
        start: makes a replica's engine.

    Raises:
        ValueError: no model, two of one name, a directory without one, or a layout it cannot be cut to.
    """
    config = config or ServeConfig()
    names = [model.name for model in models]
    if not models or len(set(names)) < len(names):
        raise ValueError(f"models {names}: there must be at least one, and no two of one name")
    key = secrets.token_hex(8)  # of this application: another's newest weights are not ours
    served = {}
    for at, model in enumerate(models):
        card, noted = model.card(), f"raytron-weights-{key}-{at}"
        check_layout(model.engine)
        options = deployment_options(model, config.max_queue)
        deployment = serve.deployment(EngineReplica).options(name=_deployment_name(at, model.name), **options)
        engine = deployment.bind(model.name, model.engine, model.each, noted, config.max_queue, start)
        served[model.name] = Source(card, engine, noted, model.replicas.min_replicas)
    # A listener has the address that clients were told: it is on the one node that stays as long as Ray.
    where = {"num_cpus": 0, "resources": {HEAD: 0.001}} if listen else {"num_cpus": 0}
    return Ingress.options(ray_actor_options=where).bind(served, config, listen)


def from_args(args: dict[str, Any]) -> serve.Application:
    """The application from plain values, behind Serve's proxies: the `import_path: raytron.serving.app:from_args` of a
    Serve configuration, such as KubeRay's serveConfigV2.

    Args:
        args: `models`, each with `ServingConfig`'s `name`, `engine` and `replicas`; and `http`, `ServeConfig`'s fields.
            Keys that it does not have come from RAYTRON_API_KEYS (separated by commas) and RAYTRON_ADMIN_KEY.

    Raises:
        ValueError: as `build`, and for a field that is not there.
    """
    if unknown := sorted(args.keys() - {"models", "http"}):
        raise ValueError(f"args: unknown key {unknown[0]!r}; there are models and http")
    secret = {
        "api_keys": [key for key in os.environ.get("RAYTRON_API_KEYS", "").split(",") if key],
        "admin_key": os.environ.get("RAYTRON_ADMIN_KEY") or None,
    }
    http = from_dict(ServeConfig, secret | dict(args.get("http", {})), "http")
    models = [from_dict(ServingConfig, model, f"models[{at}]") for at, model in enumerate(args.get("models", ()))]
    if any(model.http != ServeConfig() for model in models):
        raise ValueError("models: http is of all models together; put it beside models")
    return build([ServedModel(model.name, model.engine, model.replicas) for model in models], http, listen=False)


def deployment_options(model: ServedModel, max_queue: int) -> dict[str, Any]:
    """Serve's options of a model's engine deployment."""
    replicas, each = model.replicas, model.each
    options: dict[str, Any] = {
        "max_ongoing_requests": ANY,
        "max_queued_requests": max_queue,
        "graceful_shutdown_timeout_s": replicas.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 3,
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "logging_config": QUIET,
        "request_router_config": RequestRouterConfig(request_router_class="raytron.serving.router:PrefixRouter"),
        "ray_actor_options": _actor_options(each),
    }
    if model.engine.tp * model.engine.pp > 1:
        options["placement_group_bundles"] = bundles(model.engine, each)
        options["placement_group_strategy"] = "PACK"
        if model.engine.engine == "vllm":  # it uses the whole bundle itself
            options["ray_actor_options"] = _actor_options(options["placement_group_bundles"][0])
    if replicas.min_replicas == replicas.max_replicas:
        return options | {"num_replicas": replicas.max_replicas}
    return options | {"num_replicas": None, "autoscaling_config": autoscaling(replicas)}


def autoscaling(replicas: ReplicaConfig) -> AutoscalingConfig:
    """Serve's policy for the depth of the queue: requests in flight or waiting over the number aimed at, and delays."""
    window = min(30.0, max(2.0, replicas.downscale_delay_s / 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for an environment variable, which two applications would share
        return AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=replicas.max_replicas,
            target_ongoing_requests=replicas.target_requests,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            metrics_interval_s=window / 4,
            look_back_period_s=window,
        )


def _actor_options(each: Mapping[str, float]) -> dict[str, Any]:
    custom = {name: need for name, need in each.items() if name not in ("CPU", "GPU", "memory")}
    options = {"num_cpus": each.get("CPU", 0), "num_gpus": each.get("GPU", 0), "resources": custom}
    return options | ({"memory": each["memory"]} if "memory" in each else {})


def _deployment_name(at: int, model: str) -> str:
    return f"engine-{at}-{re.sub(r'[^A-Za-z0-9_.-]', '-', model)}"


@serve.deployment(
    name="ingress",
    max_ongoing_requests=ANY,
    graceful_shutdown_wait_loop_s=0.2,
    graceful_shutdown_timeout_s=60,
    health_check_period_s=HEALTH_S,
    logging_config=QUIET,
    max_replicas_per_node=1,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress()
class Ingress:
    """The HTTP side: one a node, each with a listener of its own."""

    async def __init__(self, models: Mapping[str, Source], config: ServeConfig, listen: bool) -> None:
        context = ray.get_runtime_context()
        alone = sum(node["Alive"] for node in ray.nodes()) == 1
        host = None if alone else ray.util.get_node_ip_address()
        self._backend = RayBackend(models, Mailbox(context.get_node_id(), host))
        await self._backend.start()
        self._app = create_app(self._backend, config)
        self._door = Server(self._app, config) if listen else None
        if self._door:
            await self._door.open()

    def __serve_build_asgi_app__(self) -> Any:
        """For `serve.ingress`."""
        return self._app

    async def url(self) -> str:
        """Where it listens, or nothing; once the engines that are to be up are known to be."""
        while self._backend.problems():
            await asyncio.sleep(0.05)
            await self._backend.look()
        return self._door.url if self._door else ""

    async def drain(self) -> None:
        """Take no more connections, and return when every request is answered."""
        if self._door:
            await self._door.close()

    async def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that raises."""
        if self._door and self._door.broken:
            raise RuntimeError("the listener ended")
        await self._backend.look()

    async def __del__(self) -> None:
        """Serve calls it at the end."""
        if getattr(self, "_door", None):
            await self._door.close()
        await self._backend.close()


class App:
    """A running application. `run` makes it; a context manager, or call `close`.

    Attributes:
        url: where it listens.
        names: of the models.
    """

    def __init__(self, models: Sequence[ServedModel], handle: Any, end: Callable[[], None]) -> None:
        self.names = tuple(model.name for model in models)
        self._handle, self._end = handle, end
        self._longest_s = max(model.replicas.drain_s for model in models)
        self.url = handle.url.remote().result(timeout_s=READY_S).replace("//0.0.0.0:", "//127.0.0.1:")
        self._closed = False

    def close(self) -> None:
        """Take no more requests, answer those there are, and end what was started. Doing it again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._handle.broadcast("drain").results(timeout_s=self._longest_s, return_exceptions=True)
        except TimeoutError:
            log.warning("some requests were not answered within %g s; they end now", self._longest_s)
        finally:
            self._end()

    def __enter__(self) -> App:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run(
    models: Sequence[ServedModel],
    config: ServeConfig | None = None,
    *,
    name: str = "raytron",
    start: Start = start_engine,
    session: Session | None = None,
) -> App:
    """Serve models on Ray: a local one, or the cluster at RAY_ADDRESS; returns when they answer.

    Args:
        name: of the Serve application; one of that name which runs already is replaced.
        start: makes a replica's engine.
        session: an open one to use, which stays open.

    Raises:
        ValueError: as `build`, and for engines that can't start as asked.
        OSError: the port is taken.
    """
    config = config or ServeConfig()
    config = replace(config, port=_free_port(config.host, config.port))
    application = build(models, config, start=start)
    own = session is None
    session = session or Session(slots=_slots(models))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started = not _serve_runs()

    def end() -> None:
        with suppress(RayServeException):
            serve.delete(name)
            if started and not session.owned and not serve.status().applications:
                serve.shutdown()
        if own:
            session.close()

    try:
        if started:
            serve.start(proxy_location="Disabled", logging_config=QUIET)
        prefix = "/" if name == "raytron" else f"/{name}"
        return App(models, serve.run(application, name=name, route_prefix=prefix, logging_config=QUIET), end)
    except BaseException as error:
        reason = _why(name) if isinstance(error, RuntimeError) else None
        end()
        if reason:
            raise ValueError(reason) from error
        raise


def serve_until_stopped(models: Sequence[ServedModel], config: ServeConfig | None = None) -> None:
    """`run`, say how to ask, and `close` on Ctrl-C or SIGTERM; a second one ends without waiting for requests.

    For the main thread.
    """
    config = config or ServeConfig()
    print(f"starting {', '.join(model.name for model in models)} ...", flush=True)
    # Handlers come after Ray's, which would end the process a few seconds after a SIGTERM.
    with Session(_slots(models)) as session, _stop_requests() as stop, run(models, config, session=session) as app:
        stop.up = True
        print(_greeting(app, config), flush=True)
        stop.wait()
        print("finishing what is running, then leaving", flush=True)


class _Stop(threading.Event):
    """Set by a signal; before `up`, a signal interrupts instead."""

    up = False


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    stop = _Stop()

    def asked(number: int, frame: Any) -> None:
        if stop.is_set() or not stop.up:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _slots(models: Sequence[ServedModel]) -> int:
    return sum(model.slots for model in models)  # Serve's controller and the ingress reserve none


def _greeting(app: App, config: ServeConfig) -> str:
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    question = json.dumps({"model": app.names[0], "prompt": "Once upon a time", "max_tokens": 32})
    return (
        f"serving {', '.join(app.names)} at {app.url} (Ctrl-C ends it); a page to chat is there too\n"
        f"ask with: curl {app.url}/v1/completions{key} -H 'Content-Type: application/json' -d '{question}'"
    )


def ask_once(path: str, prompt: str, *, max_tokens: int = 60, temperature: float = 0.7) -> str:
    """Serve the model at `path` on a free port of this machine, have it continue `prompt` over HTTP, and end it all."""
    import urllib.request

    model = ServedModel("model", EngineConfig(path=path, dtype="fp32", kv_cache_mb=64.0, threads=1))
    with run([model], ServeConfig(port=0)) as app:
        print(f"serving it at {app.url}, and asking over HTTP ...", flush=True)
        asked = {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "seed": 0}
        request = urllib.request.Request(f"{app.url}/v1/completions", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0: a listener that starts again has to be found where it was."""
    try:
        with socket.create_server((host, port)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise OSError(f"can't listen at {host}:{port}: {error.strerror or error}; choose another port") from error


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _why(name: str) -> str | None:
    """What the failed deployments say, as short as it goes."""
    with suppress(RayServeException, KeyError):
        for deployment in serve.status().applications[name].deployments.values():
            if deployment.status == "DEPLOY_FAILED":
                lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
                said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
                return (said or lines)[-1]
    return None
