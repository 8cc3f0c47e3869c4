"""`vllm serve` with the plug-in, started as users start it and asked over HTTP by the openai client."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM: `make test-vllm` brings it")

import openai
import vllm_checkpoint
from PIL import Image

import hero
from hero import mini

NAME = "mini"


def command(folder, options, *more):
    """The documented command."""
    vllm = Path(sys.executable).parent / "vllm"
    overrides = json.dumps({"hero": options})
    return [
        vllm,
        "serve",
        folder,
        "--hf-overrides",
        overrides,
        "--dtype",
        "float32",
        "--enforce-eager",
        *more,
    ]


def environment():
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vllm_checkpoint.write(tmp_path_factory.mktemp("vllm") / "mini")


@pytest.fixture(scope="module")
def client(folder):
    """A client of a server at R = 0.2, which ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    more += ["--max-model-len", "1024", "--trust-request-mm-kwargs"]
    log = folder.parent / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command(folder, {"keep_ratio": 0.2}, *more),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        until = time.monotonic() + 240
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def scene():
    return Image.open(mini.DEMO / "scene_1.png").convert("RGB")


def ask(client, image, question, **options):
    """The answer to one question about an image."""
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": content}],
        max_tokens=4,
        temperature=0,
        **options,
    )


def expected(image, question, **options):
    """(answer, length of the prompt) of transformers with hero attached."""
    loaded = mini.load(relevance=False)
    with hero.attach(loaded.model, loaded.processor, **options):
        inputs = loaded.processor(images=image, text="<image> " + question, return_tensors="pt")
        output = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return loaded.processor.decode(output[0, length:], skip_special_tokens=True).strip(), length


def test_answers_whole_and_streamed(client, scene):
    for question in mini.demo_questions():
        answer, length = expected(scene, question.question, keep_ratio=0.2)
        whole = ask(client, scene, question.question)
        assert (whole.choices[0].message.content.strip(), whole.usage.prompt_tokens) == (answer, length)
        stream = ask(client, scene, question.question, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert (text.strip(), chunks[-1].usage.prompt_tokens) == (answer, length)


def test_ratio_of_a_request(client, scene):
    """Concurrent requests with ratios of their own; a bad one is refused and ends nothing else."""
    question, ratios = mini.demo_questions()[0].question, (0.2, 0.35, 0.5, 1.0)

    def one(ratio):
        return ask(client, scene, question, extra_body={"mm_processor_kwargs": {"hero_keep_ratio": ratio}})

    with ThreadPoolExecutor(5) as pool:
        bad = pool.submit(one, 1.5)
        found = list(pool.map(one, ratios))
        with pytest.raises(openai.BadRequestError, match="hero_keep_ratio: expected a number in"):
            bad.result()
    answers = [(each.choices[0].message.content.strip(), each.usage.prompt_tokens) for each in found]
    assert answers == [expected(scene, question, keep_ratio=ratio) for ratio in ratios]


def test_bad_options_end_the_server_at_the_start(folder):
    done = subprocess.run(
        command(folder, {"keep_ratio": 2}),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    assert "hf_overrides, hero: keep_ratio: expected a number in (0, 1], got 2" in done.stdout + done.stderr
