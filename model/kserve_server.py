"""AlexNet behind KServe, in the server's own process: `python -m model.kserve_server --help`"""

from model import options
from model.alexnet import AlexNetModel
from model.front import StrictModelServer


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    args = options.kserve_options()
    print(options.listed(args), flush=True)
    model = AlexNetModel(args.model_name, args.weights, args.device, args.threads)
    model.load()
    StrictModelServer(args).start([model])


if __name__ == "__main__":
    options.run(main)
