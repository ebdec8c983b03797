"""A tiny chat model that answers questions of a judge at once, and vLLM's own OpenAI-compatible server for it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

SAYS = ("A", "B", "tie", "perhaps")
"""What it replies; which of them depends on the question. The last is no verdict."""
PAD, EOS, UNKNOWN = 0, 1, 2
WIDTH, LOUD = 64, 40.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_judge(directory: Path, texts: Sequence[str], seed: int) -> None:
    """Write a Llama of random weights that says one of ``SAYS`` and then ends.

    The output layer is deaf to all other words. Feature 0 of an embedding marks ``SAYS``, and EOS listens to it alone.

    Args:
        directory: to write to.
        texts: whose words make its vocabulary.
        seed: of the weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} - set(SAYS))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *SAYS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.3,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    says = [vocabulary[word] for word in SAYS]
    with torch.no_grad():
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = 0.0
        embedding[says, 0] = 100.0
        output.zero_()
        output[says, 1:] = torch.randn(len(SAYS), WIDTH - 1) * LOUD / WIDTH**0.5
        output[EOS, 0] = LOUD / 2
    model.save_pretrained(directory)


def greedy_reply(directory: Path, question: str, max_tokens: int) -> str:
    """What transformers would have the model say, for comparison.

    Args:
        directory: of the model.
        question: of the user.
        max_tokens: of the reply.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
    ids = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


@contextmanager
def vllm_server(model: Path, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server on this machine.

    Args:
        model: directory to serve, under its path's last name.
        log: file that it writes to.

    Yields:
        Its base URL, once it answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # with the executor "uni": no third process, which would import vLLM once more
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", model.name,
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-model-len", "512",
        "--max-num-seqs", "8", "--distributed-executor-backend", "uni",
    ]  # fmt: skip
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _until_open(server, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)


def _until_open(server: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 240) -> None:
    import urllib.error
    import urllib.request

    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"vLLM's server did not start within {seconds:g} s: {log.read_text()[-3000:]}")
