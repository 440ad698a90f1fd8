"""The playground: who gets the page, what it may load, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.http_api.playground import HEADERS, TYPES
from service.settings import Settings
from tests.service.harness import ROOT, image_bytes
from tests.service.http_api.harness import serving

PAGE = ROOT / "service" / "http_api" / "playground_page"
FILES = ["/playground", "/playground/app.js", "/playground/style.css"]


async def test_the_page_and_its_files_need_no_key_and_no_model(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:" + "0" * 64 + "\n")
    async with serving(load=False, api_keys_file=keys) as server:
        replies = [await server.request("GET", path) for path in FILES]
        post = await server.request("POST", FILES[0], b"{}")
    assert [reply.status for reply in replies] == [200, 200, 200]
    assert [reply.headers["content-type"] for reply in replies] == list(TYPES.values())
    assert b"<title>qwen3vl playground</title>" in replies[0].body
    for reply in replies:
        assert HEADERS.items() <= reply.headers.items()
    assert post.status == 405


async def test_the_page_can_be_switched_off() -> None:
    async with serving(playground="off") as server:
        replies = [await server.request("GET", path) for path in FILES]
    assert [reply.status for reply in replies] == [404, 404, 404]


@pytest.mark.parametrize(
    ("host", "playground", "served"),
    [
        ("127.0.0.1", "auto", True),
        ("::1", "auto", True),
        ("localhost", "auto", True),
        ("0.0.0.0", "auto", False),
        ("192.0.2.7", "auto", False),
        ("0.0.0.0", "on", True),
        ("127.0.0.1", "off", False),
    ],
)
def test_beyond_loopback_the_page_is_served_only_where_asked_for(
    host: str, playground: Any, served: bool
) -> None:
    settings = Settings(http_port=0, http_host=host, playground=playground, insecure=True)
    assert settings.serves_playground is served


def test_the_page_loads_nothing_from_elsewhere() -> None:
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in TYPES:
        text = (PAGE / name).read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace
        assert not re.search(r"""["'(]\s*(https?:)?//\w""", text), name


def test_no_text_of_a_model_becomes_markup() -> None:
    script = (PAGE / "app.js").read_text(encoding="utf-8")
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert way not in script
    assert not re.search(r"\son\w+=", (PAGE / "index.html").read_text(encoding="utf-8"))
    for store in ("localStorage", "sessionStorage", "document.cookie"):
        assert store not in script, "the key stays in the memory of the page"


ANSWER = {
    "objects": [
        {"label": "<b>cat</b>", "bbox_2d": [100, 200, 500, 600]},
        {"label": "dog", "point_2d": [700, 300]},
    ],
    "count": 2,
    "nothing": None,
    "large": 12345678901234567891,
    "texts": ["n5", "s", "-1"],
}
EXACT = '"decimal": 0.10000000000000000000010, "power": 1.0e30'
"""Numbers of an answer that neither Python nor JavaScript keeps as they are."""
SEED = 2**64 - 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with playwright-core and a script, and the path of Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    npm = shutil.which("npm")
    if found is None or npm is None:
        pytest.skip("needs Chromium and npm, which are not installed")
    folder = tmp_path_factory.mktemp("browser")
    command = [npm, "install", "--silent", "playwright-core@1"]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode != 0:
        pytest.skip("npm cannot install playwright-core")
    shutil.copy(Path(__file__).with_name("browse.mjs"), folder)
    return folder, found


@pytest.mark.slow
async def test_in_a_browser(browser: tuple[Path, str], tmp_path: Path) -> None:
    folder, chromium = browser
    image = tmp_path / "drawing.png"
    image.write_bytes(image_bytes(200, 100, "PNG"))
    answer = f"{json.dumps(ANSWER)[:-1]}, {EXACT}}}"
    engine = FakeEngine(answer)
    async with serving(engine) as server:
        process = await asyncio.create_subprocess_exec(
            "node", "browse.mjs", server.http.place, str(image), chromium,
            cwd=folder, env={**os.environ, "NO_PROXY": "127.0.0.1"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, problem = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 0, problem.decode()
    found = json.loads(output)
    assert found["problems"] == []
    assert "fake" in found["server"]
    assert found["verdict"].startswith("CHECKED")
    assert {"WARNING", "ENFORCED", "CHECKED"} <= set(found["marks"])
    assert found["answer"] == answer
    assert found["numbers"] == ["2", str(ANSWER["large"]), "0.10000000000000000000010", "1.0e30"]
    assert "n5, s, -1" in found["view"]
    assert json.loads(found["sent"])["seed"] == SEED
    for code, seed in zip(found["codes"], ("seed=", "seed=", '"seed": '), strict=True):
        assert f"{seed}{SEED}" in code
    options = {"close_objects": True, "property_order": "any", "schema_in_prompt": False}
    assert not options.keys() & json.loads(found["sent"]).keys()
    validated = json.loads(found["validated"])["grammar"]
    assert validated["closeObjects"] is True
    assert validated["propertyOrder"] == "PROPERTY_ORDER_ANY"
    assert options.items() <= json.loads(found["wishes"]).items()
    python, grpc, curl = found["codes_of_wishes"]
    extra = python.partition("extra_body=")[2]
    assert '"close_objects": True' in extra
    assert '"property_order": "any"' in extra
    assert '"schema_in_prompt": False' in extra
    given = "close_objects=True, property_order=pb.PROPERTY_ORDER_ANY"
    assert re.search(rf"pb\.Grammar\(.*, {given}\), schema_in_prompt=False\)", grpc)
    assert '"close_objects": true' in curl
    assert '"property_order": "any"' in curl
    assert found["options_of_text"] is False
    assert not options.keys() & json.loads(found["plain"]).keys()
    assert found["wrong_seed"] == [False, True], "not sent, and shown to the person"
    assert found["cells"][:4] == ["<b>cat</b>", "100, 200, 500, 600", "", "dog"]
    assert found["box"] == ["100", "200", "400", "400"]
    assert found["labels"] == ["<b>cat</b>", "dog"]
    assert found["point"] == ["700", "300"]
    assert "tokens" in found["facts"]
    assert found["wrong_schema"] != ""
    assert found["refused"].startswith("INVALID_FIELD") or "temperature" in found["refused"]
    assert "curl" in found["code"]
    assert found["chooser"], "with the keyboard alone"
    assert found["pasted"] == 2
    assert found["while_checking"] == "Checking …", "not the verdict on what stood there before"
    assert found["fits_a_phone"]
    assert found["down"] == "NO_ANSWERThe server does not answer."
