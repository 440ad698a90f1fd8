"""llama.cpp's own HTTP server, which the package ``xllamacpp`` contains: ``llama_cpp.py FOLDER PORT``.

Runs in an environment of its own, so it imports nothing of this project. FOLDER has ``text.gguf`` and
``mmproj.gguf``; without the second one there are no images. Options after PORT set fields of llama.cpp:
``image_min_tokens=40``, ``model_alias=NAME``.
"""

import os
import sys
import threading

import xllamacpp  # type: ignore[import-not-found]

folder, port, *options = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path = f"{folder}/text.gguf"
if os.path.exists(f"{folder}/mmproj.gguf"):
    parameters.mmproj.path = f"{folder}/mmproj.gguf"
parameters.n_ctx = 4096
parameters.n_parallel = 1
parameters.use_jinja = True
# A second thread would wait for the first in a loop, which is slow on a busy machine.
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.n_gpu_layers = 0
parameters.mmproj_use_gpu = False
parameters.fit_params = False
parameters.cache_ram_mib = 0
parameters.verbosity = 1
parameters.hostnames = ["127.0.0.1"]
parameters.port = int(port)
for option in options:
    name, value = option.split("=")
    setattr(parameters, name, {value} if name == "model_alias" else int(value))
server = xllamacpp.Server(parameters)
print("listening", server.listening_address, flush=True)
threading.Event().wait()
