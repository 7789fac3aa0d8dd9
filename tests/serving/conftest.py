"""A live server of a real engine: a small Llama of random weights that speaks bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from raytron.checkpoint import save_pretrained
from raytron.config import EngineConfig, ServeConfig
from raytron.data.tokenizer import ByteTokenizer
from raytron.inference import EngineLoop, make_engine
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.serving import LocalBackend, Server, create_app

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% for t in tools or [] %}tool {{ t.function.name }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "initializer_range": 0.2,  # wide enough for the likeliest token to be so by far
}


def save_model(path: Path, seed: int = 0, template: str | None = TEMPLATE) -> str:
    """A Hugging Face directory with random weights."""
    model = build(DecoderConfig(**SHAPE), seed=seed + 1)
    save_pretrained(model, path, tokenizer=ByteTokenizer())
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return str(path)


@dataclass
class Live:
    """A running server, and what is behind it."""

    url: str
    loop: EngineLoop
    path: str

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        """OpenAI's own client, which by default does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@contextmanager
def serving(path: str, config: ServeConfig | None = None, name: str = "tiny", **engine) -> Iterator[Live]:
    """Serve the model at `path` on a free port."""
    config = config or ServeConfig(port=0)
    engine = {"path": path, "dtype": "fp32", "max_num_seqs": 16, "kv_cache_mb": 8.0, "threads": 1, **engine}
    loop = EngineLoop(make_engine(EngineConfig(**engine)), max_queue=config.max_queue)
    backend = LocalBackend({name: (loop, path)})
    try:
        with Server(create_app(backend, config), config) as server:
            yield Live(server.url, loop, path)
    finally:
        backend.close()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture(scope="session")
def live(model_path) -> Iterator[Live]:
    """One server for all tests that leave it as it was."""
    with serving(model_path) as server:
        yield server


@pytest.fixture(scope="session")
def client(live) -> openai.OpenAI:
    return live.client()
