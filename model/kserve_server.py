"""AlexNet behind KServe, in the server's own process: `python -m model.kserve_server --help`"""

from model import options
from model.alexnet import AlexNetModel
from model.batcher import gathered
from model.front import StrictModelServer


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.kserve_options()
    print(options.listed(args), flush=True)
    model = AlexNetModel(**options.of_model(args))
    model.load()
    StrictModelServer(args).start([gathered(model, args)])


if __name__ == "__main__":
    options.run(main)
