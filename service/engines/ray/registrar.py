"""The registrar of a deployment: an actor that starts it, counts the servers that use it, and ends
it after the last one.

Every deployment has one registrar in its cluster, whatever number of servers there are, so that two
servers that start at the same time do not both deploy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from service.engines.ray.plan import Plan
from service.engines.ray.replica import Replica

NAMESPACE = "qwen3vl"
ATTEND_S = 5.0
"""Time between two reports of a server, in seconds."""
SILENT_S = 30.0
"""Time without a report after which a server counts as ended, in seconds."""
LOOK_S = 1.0
"""Time between two looks at the replicas, in seconds."""
DEPLOYMENT = "engine"
HEALTH_PERIOD_S, HEALTH_LIMIT_S = 2.0, 30.0
"""Time between two health checks of a replica, and after which one has failed, in seconds."""
STOP_LIMIT_S = 30.0
"""Maximum time for the requests of a replica that Ray ends, in seconds."""
REPLICA = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Environment of replicas. Engines do not block the event loop, so their messages need no second one."""
START_ATTEMPTS = 3
"""Attempts to start a replica."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a server learns when it reports.

    differences: the settings in which it differs from the deployment that runs; nothing else then
    holds. running: replicas that take requests. failed: the replicas cannot be started. message: of
    Ray, or of the engine that did not start, for operators.
    """

    differences: str = ""
    running: int = 0
    failed: bool = False
    message: str = ""


@dataclass(slots=True)
class _Users:
    """The servers that use a deployment."""

    seen: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)
    """When there was a server for the last time."""

    def note(self, server: str) -> None:
        self.seen[server] = self.last = time.monotonic()

    def forget(self, server: str) -> None:
        self.seen.pop(server, None)

    def others(self, server: str) -> bool:
        """Whether another server is there."""
        self.forget_silent()
        return bool(self.seen.keys() - {server})

    def gone_s(self) -> float:
        """Seconds since the last server ended; 0 while there is one."""
        self.forget_silent()
        now = time.monotonic()
        if self.seen:
            self.last = now
        return now - self.last

    def forget_silent(self) -> None:
        oldest = time.monotonic() - SILENT_S
        for server in [name for name, seen in self.seen.items() if seen < oldest]:
            del self.seen[server]


class Registrar:
    """See the module. Ray runs its methods in one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._plan: Plan | None = None
        self._users = _Users()
        self._report = Report()
        self._start_error = ""
        self._changing = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def attend(self, server: str, plan: Plan) -> Report:
        """A server uses the deployment, and goes on to for the next ``SILENT_S`` seconds."""
        async with self._changing:
            differences = "" if self._plan is None else self._plan.differences(plan)
            if differences and self._users.others(server):
                return Report(differences=differences)
            self._users.note(server)
            if self._plan is None or differences:
                await asyncio.to_thread(self._deploy, plan, replaced=bool(differences))
                self._plan, self._report, self._start_error = plan, Report(), ""
            if self._looking is None:
                self._looking = asyncio.create_task(self._look(), name="look")
        return self._report

    async def leave(self, server: str) -> None:
        """A server has ended."""
        self._users.forget(server)

    async def start_failed(self, message: str) -> None:
        """The engine of a replica did not start."""
        self._start_error = message

    def _deploy(self, plan: Plan, *, replaced: bool) -> None:
        """Start the deployment, unless a registrar before this one has."""
        from ray import serve

        serve.start(proxy_location="Disabled")
        if replaced:
            serve.delete(plan.name)
        elif plan.name in serve.status().applications:
            return
        target = application(plan)
        serve.run_many(
            [serve.RunTarget(target, name=plan.name, route_prefix=None)],
            wait_for_ingress_deployment_creation=True,
            wait_for_applications_running=False,
        )

    async def _look(self) -> None:
        """Look at the replicas for ever; end the deployment when no server uses it."""
        while True:
            await asyncio.sleep(LOOK_S / 5 if not self._report.running else LOOK_S)
            async with self._changing:
                assert self._plan is not None
                try:
                    self._report = await asyncio.to_thread(self._replicas)
                except Exception:  # of Ray, of many types
                    log.warning("Ray does not tell the state of the replicas", exc_info=True)
                    self._report = Report(message="Ray does not tell the state of the replicas")
                if (gone_s := self._users.gone_s()) and gone_s >= self._plan.linger_s:
                    try:
                        await asyncio.to_thread(self._end)
                    except Exception:  # of Ray, of many types; the next look tries again
                        log.warning("the deployment could not be ended", exc_info=True)

    def _replicas(self) -> Report:
        from ray import serve

        found = serve.status().applications.get(self._name)
        if found is None:
            return Report(failed=True, message="the deployment was deleted")
        running, messages = 0, [found.message]
        for one in found.deployments.values():
            running += one.replica_states.get("RUNNING", 0)
            messages.append(one.message)
        failed = found.status == "DEPLOY_FAILED"
        text = self._start_error or "; ".join(filter(None, messages))
        return Report(running=running, failed=failed and not running, message=text)

    def _end(self) -> None:
        import ray
        from ray import serve

        serve.delete(self._name)
        ray.kill(ray.get_runtime_context().current_actor)


def application(plan: Plan) -> Any:
    """The deployment for Ray Serve."""
    from ray import serve

    scale = plan.scale
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": scale.ongoing,
        "max_queued_requests": -1,  # the servers bound what they let in
        "ray_actor_options": {
            "num_cpus": scale.cpus,
            "num_gpus": scale.gpus,
            "runtime_env": {"env_vars": REPLICA},
        },
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_LIMIT_S,
        "graceful_shutdown_timeout_s": STOP_LIMIT_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": START_ATTEMPTS,
        "logging_config": {"enable_access_log": False},
    }
    if scale.max_replicas is None:
        options["num_replicas"] = scale.replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": scale.replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_ongoing,
        }
    deployment = serve.deployment(Replica).options(**options)
    return deployment.bind(plan.build, scale.text_delay_s, scale.ongoing, StartFailure(plan.name))


@dataclass(frozen=True)
class StartFailure:
    """Tells the registrar why a replica did not start."""

    name: str

    def __call__(self, message: str) -> None:
        import ray

        registrar = ray.get_actor(self.name, namespace=NAMESPACE)
        registrar.start_failed.remote(message)


def registrar(name: str) -> Any:
    """The registrar of a deployment, which is made where there is none. Blocks for a second."""
    import ray

    actor = ray.remote(Registrar).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
    )
    return actor.remote(name)
