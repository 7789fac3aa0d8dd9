"""What judges the episodes of an RL run besides the task: a reward model's actors, a judge, a reward of one's own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from raytron.actors import ScorerGroup
from raytron.inference import Scorer
from raytron.metrics import Timeline
from raytron.models import read_arch
from raytron.rl.config import JudgeConfig, RLConfig
from raytron.rl.environments import Generated, Prompt, Task
from raytron.rl.rewards import LLMJudge, ModelReward, Overall, Reward, Weighted, chosen_label, overall, reader

__all__ = ["Scorers"]


class Scorers:
    """Checks what `config.reward` names, and runs it.

    Args:
        task: whose answers are judged.
        reward: one's own, with weight 1; besides what the configuration names.

    Attributes:
        bundles: resources that each replica of a reward model takes.
        lanes: of a timeline of all that judges.

    Raises:
        ValueError: no such model or label, a template without an answer in it, another vocabulary than the task's.
    """

    def __init__(self, config: RLConfig, task: Task, reward: Reward | None = None) -> None:
        self._config, self._reproducible = config.reward, config.reproducible
        model, judge = self._config.model, self._config.judge
        self.bundles: list[dict[str, float]] = []
        self.lanes = [_lane(replica) for replica in range(model.replicas) if model.path is not None]
        self.lanes += ["judge"] * (judge.url is not None)
        self._parts: list[tuple[float, Reward]] = [] if reward is None else [(1.0, reward)]
        if judge.url is not None:
            self._parts.append((judge.weight, _judge(judge)))
        if model.path is not None:
            self.bundles = [{"CPU": model.tp * model.cpus, "GPU": model.tp * model.gpus}] * model.replicas
            self._arch, self._read = read_arch(model.path), reader(model.path, model.template)
            self._label = chosen_label(model.path, self._arch, model.label)
            if model.template is None and self._arch.vocab_size < task.vocab_size:
                raise ValueError(
                    f"the policy has token ids up to {task.vocab_size - 1}, and the vocabulary of the reward model "
                    f"{model.path} ends at {self._arch.vocab_size - 1}; with another tokenizer than the policy's it "
                    "needs a reward.model.template (chat, or text with {prompt} and {response})"
                )
        elif self._config.task is not None and not self._parts:
            raise ValueError("reward.task weighs the task's verdict against a reward.model or reward.judge: name one")

    @asynccontextmanager
    async def running(self, wait_s: float, timeline: Timeline) -> AsyncIterator[Overall | None]:
        """What judges episodes, while its actors run; None where the task alone does.

        timeline: gets a lane for each of the reward model's replicas, and for the judge.

        Raises CapacityError where the cluster cannot hold them, WorkerError where they cannot start.
        """
        options = self._config
        parts = [(w, _Watched(r, timeline) if isinstance(r, LLMJudge) else r) for w, r in self._parts]
        async with AsyncExitStack() as stack:
            if options.model.path is not None:
                group = self._group(wait_s)
                group.on_state = partial(_note, timeline)
                await stack.enter_async_context(group)
                model = ModelReward(group.score, self._arch, self._read, self._label)
                parts.append((options.model.weight, model))
            yield overall(_sum(parts), options.task or 0.0, options.timeout_s) if parts else None

    def _group(self, wait_s: float) -> ScorerGroup:
        model = self._config.model
        return ScorerGroup(
            Scorer,
            (model.path, model.dtype, model.max_batch_tokens, self._reproducible),
            replicas=model.replicas,
            tp=model.tp,
            each={"CPU": model.cpus, "GPU": model.gpus},
            most_tokens=4 * model.max_batch_tokens,
            max_failures=model.max_restarts,
            timeout_s=model.timeout_s,
            wait_s=wait_s,
        )


def _note(timeline: Timeline, replica: int, what: str) -> None:
    timeline.state(_lane(replica), None if what == "idle" else what)


def _lane(replica: int) -> str:
    return f"reward model {replica}"


class _Watched:
    """A judge with a lane on the timeline, where it judges for as long as it has something to judge."""

    def __init__(self, judge: LLMJudge, timeline: Timeline) -> None:
        self.concurrency, self.__name__ = judge.concurrency, type(judge).__name__  # as if it were the judge
        self._judge, self._timeline, self._under_way = judge, timeline, 0

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        self._count(1)
        try:
            return await self._judge(prompt, answer)
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self._under_way += more
        self._timeline.state("judge", "judging" if self._under_way else None)


def _sum(parts: list[tuple[float, Reward]]) -> Reward:
    (weight, reward), *others = parts
    return reward if weight == 1 and not others else Weighted(*parts)


def _judge(config: JudgeConfig) -> LLMJudge:
    given = {name: getattr(config, name) for name in ("template", "pattern") if getattr(config, name) is not None}
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ValueError(f"reward.judge.api_key_env names {config.api_key_env}, which is not set")
    return LLMJudge(
        config.url,
        config.model,
        **given,
        best=config.best,
        api_key=key,
        concurrency=config.concurrency,
        request=config.request,
    )
