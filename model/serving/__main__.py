"""Any kserve.Model behind KServe: `python -m model.serving [NAME=]MODULE:CLASS … --help`"""

from model.serving.lifecycle import run


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    from model.serving.cli import server_config  # here, so that a signal is obeyed from now on

    config = server_config()

    from model.serving.start import start

    start(config)


if __name__ == "__main__":
    run(main)
