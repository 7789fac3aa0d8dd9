"""An engine simple enough to know every answer: to a prompt ending in 5 it says 6, 7, 8, ... (all requests at once)."""

from collections.abc import Iterable

from raytron.inference import Output, Request, Stats, WeightUpdateError

POISON, DEADLY = 666, 667  # the last token of prompts that can't be answered, and that kill the engine


class CountingEngine:
    """Implements `Engine`; `limit` bounds the requests computed together, as memory does in a real one."""

    max_model_len = 10_000

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.version, self.paused, self.stale, self.closed = limit, 0, False, False, False
        self.progress: dict[str, tuple[Request, list[int]]] = {}

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[-1] == POISON:
            raise ValueError("poison")
        self.progress[request.id] = (request, [0] * request.params.n)

    def step(self) -> list[Output]:
        if self.paused:
            return []
        outputs = []
        for id, (request, made) in list(self.progress.items())[: self.limit]:
            if request.prompt_token_ids[-1] == DEADLY:
                raise RuntimeError("the engine broke")
            for index, count in enumerate(made):
                made[index] = count + 1
                end = "length" if made[index] == request.params.max_tokens else None
                token = request.prompt_token_ids[-1] + made[index]
                outputs.append(Output(id, index, (token,), (0.0,), (self.version,), f"{token} ", finish_reason=end))
            if made[0] == request.params.max_tokens:
                del self.progress[id]
        return outputs

    def has_unfinished(self) -> bool:
        return bool(self.progress)

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        gone = [self.progress.pop(id)[0] for id in request_ids if id in self.progress]
        return [Output(r.id, index, finish_reason="abort") for r in gone for index in range(r.params.n)]

    def pause(self, mode: str = "keep") -> list[Output]:
        self.paused = True
        return self.abort(list(self.progress)) if mode == "abort" else []

    def resume(self) -> None:
        self.paused = False

    def sleep(self, weights: bool = False) -> list[Output]:
        self.paused, self.stale = True, weights
        return []

    def wake(self) -> None:
        self.paused = self.stale

    def start_weight_update(self, mode: str = "keep") -> list[Output]:
        return self.pause(mode)

    def update_weights(self, weights: object) -> None:
        if "bad" in str(weights):
            self.stale = True
            raise WeightUpdateError("they do not fit")
        if "other" in str(weights):
            self.paused = False
            raise WeightUpdateError("they are of another model")

    def finish_weight_update(self, version: int) -> None:
        self.version, self.paused, self.stale = version, False, False

    def stats(self) -> Stats:
        health = "stale: half new" if self.stale else "ready"
        return Stats(running=len(self.progress), version=self.version, paused=self.paused, health=health)

    def close(self) -> None:
        self.closed = True
