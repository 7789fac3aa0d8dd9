"""Serve a model over HTTP on Ray: OpenAI's API, a chat page at /, metrics; `raytron serve PATH` without a recipe.

python recipes/serve.py                                              # what the quickstart trained
python recipes/serve.py --engine.path /models/Llama-3.2-1B-Instruct --engine.tp 2 --replicas.max-replicas 4
"""

from raytron.config import EngineConfig, ServingConfig, cli

config = ServingConfig(name="quickstart", engine=EngineConfig(path="runs/quickstart", dtype="fp32"))

if __name__ == "__main__":
    config = cli(config, description=__doc__)
    from dataclasses import replace
    from os.path import abspath

    from raytron.cli import model_directory
    from raytron.serving.app import ServedModel, serve_until_stopped

    engine = replace(config.engine, path=abspath(model_directory(config.engine.path)))
    serve_until_stopped([ServedModel(config.name, engine, config.replicas)], config.http)
