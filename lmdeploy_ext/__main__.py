"""``python -m lmdeploy_ext …`` runs ``lmdeploy …`` with the extension, in this process and its
workers."""

from __future__ import annotations

import os
import site
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from lmdeploy_ext import autoload
from lmdeploy_ext.switches import OFF, ON

HELP = f"""\
usage: python -m lmdeploy_ext COMMAND …

Runs `lmdeploy COMMAND …` with Qwen3-VL on TurboMind. Every command and option is LMDeploy's own:

  python -m lmdeploy_ext serve api_server Qwen/Qwen3-VL-8B-Instruct
  python -m lmdeploy_ext chat Qwen/Qwen3-VL-2B-Instruct
  python -m lmdeploy_ext serve api_server --help

Added to `serve api_server` and `chat`:

  --disable-vision   leave the vision tower out and refuse images, video and audio; also
                     spelled --disable-vision-encoder

What a new release of LMDeploy has changed of what the extension uses, for its maintainers:

  python -m lmdeploy_ext verify

The same for the plain command:  {autoload.VARIABLE}=1 lmdeploy serve api_server …
In Python, before LMDeploy is used:  import lmdeploy_ext; lmdeploy_ext.install()
"""
LINE = "qwen3vl_lmdeploy_ext.pth"
"""Name of `autoload.pth` in site-packages."""


def main(arguments: list[str]) -> None:
    """Run LMDeploy's command line with the extension.

    Raises:
        SystemExit: with LMDeploy's exit code; 1 if LMDeploy is missing or the extension cannot be
        installed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if arguments[0] == "verify":
        _verify(arguments[1:])
    if find_spec(autoload.HOST) is None:
        sys.exit(
            "LMDeploy is not installed. It runs on Linux on x86-64: pip install 'lmdeploy>=0.18.0,<0.19'"
        )
    if not workers_get_it():
        sys.exit(
            f"{LINE} is not in site-packages: worker processes would run LMDeploy without the "
            "extension. Install this package (pip install), do not only put it on the path."
        )
    os.environ[autoload.VARIABLE] = ON[0]
    autoload.arm()
    from lmdeploy.cli import run

    sys.argv[:] = ["lmdeploy", *arguments]
    run()


def _verify(arguments: list[str]) -> NoReturn:
    from lmdeploy_ext import verify
    from lmdeploy_ext.patch import ExtensionError

    os.environ[autoload.VARIABLE] = OFF[0]  # on the unchanged LMDeploy
    try:
        sys.exit(verify.main(arguments))
    except ExtensionError as error:
        sys.exit(str(error))


def workers_get_it() -> bool:
    """Whether child Python processes run the line of ``autoload.pth`` that activates the
    extension."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return any((Path(folder) / LINE).is_file() for folder in folders)


if __name__ == "__main__":
    main(sys.argv[1:])
