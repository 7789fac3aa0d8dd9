"""Supervised fine-tuning on prompts and answers: the driver of pretraining on other data, which ends by asking.

    lines of JSON -> tokens and masks, once -> actors: rows by index, loss on the answers -> a Hugging Face directory

The directory carries its tokenizer, and is what `--model.path` of an RL run takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from raytron.config import RunConfig, ScalingConfig, SFTConfig
from raytron.data import SFTDataset, build_sft_datasets, load_tokenizer, prepare_examples
from raytron.models.registry import resolve
from raytron.pretrain import Run, check_vocabulary
from raytron.training.sft import SFTTask

if TYPE_CHECKING:
    import ray.train

    from raytron.inference import LLM

__all__ = ["run"]

ANSWER_TOKENS = 128  # that are shown at most
SHOWN = 400  # characters of a prompt, its end


def run(
    config: SFTConfig,
    *,
    run_config: RunConfig | ray.train.RunConfig | None = None,
    scaling_config: ScalingConfig | ray.train.ScalingConfig | None = None,
) -> ray.train.Result:
    """Fine-tune as `config` says, on Ray actors, and return Ray Train's result.

    Args and errors as in `raytron.pretrain.run`. A model from a preset takes the tokenizer's vocabulary.

    Returns:
        `metrics` of the last step and the held-out loss (`eval_loss`), the newest `checkpoint` (its `model` folder is a
        Hugging Face directory with the tokenizer), and the run's `path`.

    Raises:
        ValueError: also for lines that are no examples, with file and line, and for examples that are too long.
    """
    return _Run.of(config, run_config, scaling_config).drive()


class _Run(Run):
    """See `pretrain.Run`."""

    task = SFTTask

    def architecture(self) -> Any:
        """A new model takes the tokenizer's vocabulary."""
        arch = resolve(self.config.model)
        if self.config.model.path is not None:
            return arch
        tokenizer = load_tokenizer(self.config.tokenizer)
        return arch.replace(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eod, bos_token_id=None)

    def prepare(self, cache: str) -> None:
        """Tokenize, say what does not fit, and count the steps of the epochs."""
        config = self.config
        check_vocabulary(load_tokenizer(config.tokenizer).vocab_size, self.arch.vocab_size)
        self.prepared = prepare_examples(config.data, config.tokenizer, cache)
        size = config.global_batch_size
        train, self.held_out = build_sft_datasets(config.data, self.prepared, size, epochs=config.epochs)
        self.train = train
        if not config.steps:
            self.config = replace(config, steps=len(train) // size)
        for what, dataset in (("training", train), ("held-out", self.held_out)):
            if dataset is not None and str(dataset.fit):
                self.say(f"{what} {dataset.fit}")

    def source(self) -> str:
        """The data, in words."""
        prepared, config = self.prepared, self.config
        rows = int((self.train.lengths > 0).sum()) / config.epochs
        return (
            f"{config.data.path}, {prepared.examples:,} examples of {prepared.tokens:,} tokens, "
            f"{prepared.answer_tokens:,} of them answers; {rows:,.0f} rows an epoch, {config.steps:,} steps"
        )

    def unigram(self) -> float | None:
        """None: what tokens are frequent in answers says little of them."""
        return None

    def show(self, checkpoint: str | None) -> None:
        """Ask the trained model some of the held-out prompts (else of those it was trained on)."""
        if not self.config.answers or checkpoint is None or "://" in checkpoint:
            return
        from raytron.inference import LLM

        longest = self.config.data.sequence_length + 1 + ANSWER_TOKENS
        options = {
            "dtype": "bf16" if self.config.precision == "bf16" else "fp32",
            "max_model_len": min(self.arch.max_position_embeddings, longest),
            "kv_cache_mb": 256.0,
        }
        try:
            llm = LLM(f"{checkpoint}/model", **options)
        except (ValueError, RuntimeError, MemoryError) as error:  # the run is done, and not undone by this
            self.say(f"no sample answers: the driver can't hold the model ({error}); `answers 0` does not try")
            return
        with llm:
            self._ask(llm, self.held_out or self.train)

    def _ask(self, llm: LLM, dataset: SFTDataset) -> None:
        from raytron.inference import SamplingParams

        which = "held-out prompts" if dataset is self.held_out else "prompts of the training"
        self.say(f"\n{which}, and what the model answers:", style="bold")
        examples = dataset.examples
        for i in dataset.fit.kept[: self.config.answers].tolist():
            span = slice(int(examples.starts[i]), int(examples.starts[i + 1]))
            prompt, wanted = first_answer(np.asarray(examples.tokens[span]), np.asarray(examples.chosen[span]))
            room = min(ANSWER_TOKENS, self.arch.max_position_embeddings - len(prompt))
            if room < 1:
                continue
            params = SamplingParams(temperature=0.0, max_tokens=room, stop_token_ids=(wanted[-1],))
            answer = llm.generate(prompt, params)[0].outputs[0]
            for name, ids in (("prompt", prompt), ("answer", answer.token_ids), ("wanted", wanted)):
                self.say(f"  {name}: {llm.tokenizer.decode(ids)[-SHOWN:]!r}", style="")


def first_answer(tokens: np.ndarray, chosen: np.ndarray) -> tuple[list[int], list[int]]:
    """What comes before the first run of chosen tokens, and the run."""
    begin = int(np.argmax(chosen[1:])) + 1
    rest = np.flatnonzero(~chosen[begin:])
    end = begin + int(rest[0]) if len(rest) else len(tokens)
    return tokens[:begin].tolist(), tokens[begin:end].tolist()
