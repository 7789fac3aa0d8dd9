"""Generate with a model offline: a few prompts here; for files of prompts there is `raytron generate`.

python recipes/offline_inference.py                                  # what the quickstart trained
python recipes/offline_inference.py --path /models/Llama-3.2-1B-Instruct --tp 2 --dtype bf16
python recipes/offline_inference.py --engine vllm --path /models/Llama-3.2-1B-Instruct
"""

from raytron.config import EngineConfig, cli

config = EngineConfig(path="runs/quickstart", dtype="fp32")
prompts = [
    "class Reader:\n    def read(self, size=-1):\n        ",
    "import os\nimport ",
    'def main():\n    """',
]

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from dataclasses import replace

    from raytron.cli import model_directory
    from raytron.inference import LLM, SamplingParams

    config = replace(config, path=model_directory(config.path))
    with LLM.from_config(config) as llm:
        for generation in llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=60, seed=0)):
            output = generation.outputs[0]
            nats = -sum(output.logprobs) / max(len(output.logprobs), 1)
            print(f"--- {len(output.token_ids)} tokens, {output.finish_reason}, {nats:.2f} nats per token")
            print(f"{generation.prompt}\033[1m{output.text}\033[0m")
