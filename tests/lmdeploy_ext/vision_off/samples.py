"""Content parts that are not text, under every name that an API has for them, and bodies that are text."""

from __future__ import annotations

from typing import Any

DATA = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
PIXEL = f"data:image/png;base64,{DATA}"
URL = {"url": PIXEL}

PARTS: dict[str, Any] = {
    "image_url": {"type": "image_url", "image_url": URL},
    "image_url as text": {"type": "image_url", "image_url": PIXEL},
    "image": {"type": "image", "image": URL},
    "image_data": {"type": "image_data", "image_data": {"data": DATA}},
    "input_image": {"type": "input_image", "image_url": PIXEL},
    "Anthropic image": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": DATA},
    },
    "Anthropic image by file": {"type": "image", "source": {"type": "file", "file_id": "f"}},
    "Anthropic document": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": DATA},
    },
    "video_url": {"type": "video_url", "video_url": URL},
    "video": {"type": "video", "video": URL},
    "input_video": {"type": "input_video", "video_url": "x"},
    "audio_url": {"type": "audio_url", "audio_url": URL},
    "audio": {"type": "audio", "audio": URL},
    "input_audio": {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
    "time_series_url": {"type": "time_series_url", "time_series_url": URL},
    "time_series": {"type": "time_series", "time_series": URL},
    "file": {"type": "file", "file": {"file_data": DATA}},
    "input_file": {"type": "input_file", "file_data": DATA},
    "unknown name": {"type": "hologram", "hologram": URL},
    "no type": {"image_url": URL},
    "hidden in a text": {"type": "text", "text": "hi", "image_url": URL},
}

CALL = {"type": "function", "id": "c", "function": {"name": "show", "arguments": '{"image": 1}'}}
SCHEMA = {"type": "object", "properties": {"image": {"type": "image"}, "video_url": {}}}
TEXT_BODIES: dict[str, Any] = {
    "nothing": {},
    "no object": [{"type": "image"}],
    "completions": {"prompt": ["a", [1, 2, 3]]},
    "generate": {"prompt": "a picture: <image>", "image_data": None, "video_data": []},
    "chat": {
        "messages": [
            {"role": "system", "content": "data:image/png;base64,AAAA"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}, "plain"]},
            {"role": "assistant", "content": None, "audio": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "ok"}]},
        ],
        "tools": [{"type": "function", "function": {"name": "show", "parameters": SCHEMA}}],
        "media_io_kwargs": {"image": {}},
    },
    "responses": {
        "instructions": "be brief",
        "input": [
            {"role": "developer", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "show", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "ok"},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x"}],
            },
        ],
    },
    "anthropic": {
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "…", "signature": "s"},
                    {"type": "redacted_thinking", "data": "…"},
                    {"type": "tool_use", "id": "c", "name": "show", "input": {"image": "a.png"}},
                    {"type": "server_tool_use", "id": "d", "name": "web_search", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c", "content": "ok"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "c",
                        "content": [{"type": "text", "text": "ok"}],
                    },
                ],
            },
        ],
    },
}
