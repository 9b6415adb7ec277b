"""AlexNet behind Triton's Python backend: `python -m model.loadtest.peers.triton_server`.

Triton comes from PyTriton's wheel, which brings its programs; PyTriton itself is not used. Each
worker is a process of Triton's; it speaks V2.
"""

import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from model.loadtest.peers import command_line, program

CONFIG = """
backend: "python"
max_batch_size: {max_batch_size}
dynamic_batching {{ max_queue_delay_microseconds: {wait_us} }}
instance_group [ {{ count: {workers}, kind: KIND_CPU }} ]
input [ {{ name: "image", data_type: TYPE_STRING, dims: [1] }} ]
output [ {{ name: "label", data_type: TYPE_STRING, dims: [5] }},
         {{ name: "probability", data_type: TYPE_FP32, dims: [5] }} ]
"""


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    options = command_line.options(__spec__.name)
    package = Path(find_spec("pytriton").origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        backends = Path(folder, "backends")
        shutil.copytree(package / "tritonserver" / "backends", backends)
        shutil.copy(
            package / "tritonserver" / "python_backend_stubs" / version / stub,
            backends / "python" / stub,
        )
        model = Path(folder, "models", command_line.NAME)
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text(
            "from model.loadtest.peers.triton_model import TritonPythonModel as TritonPythonModel\n"
        )
        values = vars(options) | {"wait_us": int(1000 * options.batch_wait_ms)}
        (model / "config.pbtxt").write_text(CONFIG.format(**values))
        program.run(
            [
                str(package / "tritonserver" / "bin" / "tritonserver"),
                f"--model-repository={model.parent}",
                f"--backend-directory={backends}",
                f"--http-address={command_line.HOST}",
                f"--http-port={options.port}",
                "--allow-grpc=false",
                "--allow-metrics=false",
            ],
            LD_LIBRARY_PATH=str(package.parent / "nvidia_pytriton.libs"),
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=":".join(filter(None, sys.path)),
            **command_line.for_workers(),
        )


if __name__ == "__main__":
    main()
