"""TimedModel in KServe's own process: `python -m model.loadtest.pays.plain_server`.

It takes KServe's arguments; `--workers 2` makes two such processes.
"""

from kserve import ModelServer

from model.loadtest.pays.timed_model import TimedModel

if __name__ == "__main__":
    model = TimedModel("custom-model")
    model.load()
    ModelServer().start([model])
