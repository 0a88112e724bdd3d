"""Run by an interpreter that has llama_cpp: {"model", "prompts", "texts", "tokens"} on stdin, the reply on stdout.

For each prompt its ids and the greedy answer (up to `tokens` tokens or an end token); for each text its ids. The cache
is float32 (type 0), so that only the weights are of the file's type.
"""

import json
import os
import sys

import llama_cpp

request = json.load(sys.stdin)
threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
model = llama_cpp.Llama(request["model"], n_ctx=1024, n_threads=threads, verbose=False, type_k=0, type_v=0)


def ids(text):
    return model.tokenize(text.encode(), add_bos=True, special=True)


def answer(prompt):
    model.reset()
    tokens = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(model._model.vocab, token) or len(tokens) == request["tokens"]:
            break
        tokens.append(token)
    return tokens


prompts = [ids(text) for text in request["prompts"]]
answers = [answer(prompt) for prompt in prompts]
reply = {
    "version": llama_cpp.__version__,
    "prompts": prompts,
    "answers": answers,
    "texts": [model.detokenize(tokens).decode("utf-8", "replace") for tokens in answers],
    "ids": [ids(text) for text in request["texts"]],
    "template": model.metadata.get("tokenizer.chat_template"),
}
print(json.dumps(reply))
