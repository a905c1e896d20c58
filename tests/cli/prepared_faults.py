"""Configuration and data faults that `treegrpo up` must find before a run; `python -m tests.cli.prepared_faults` tries each."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.cli.command_harness import treegrpo
from tests.cli.small_run import GEOHOP, SmallRun, question, write_rows

Changes = Mapping[str, str]
LIMIT_SECONDS = 15.0
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class PreparedFault:
    name: str
    prepare: Callable[[SmallRun], Changes]
    """Puts the fault into the workbench, and returns the flags that go with it."""
    says: str
    """What its sentence has, the remedy included: a regular expression."""


def model(change: Callable[[Path], None]) -> Callable[[SmallRun], Changes]:
    """A fault of the model directory, a copy of the shipped one."""

    def prepare(small_run: SmallRun) -> Changes:
        folder = small_run.folder / "model"
        shutil.copytree(GEOHOP / "model", folder)
        change(folder)
        return {"model.path": str(folder)}

    return prepare


def text(name: str, content: str) -> Callable[[SmallRun], Changes]:
    return model(lambda folder: void((folder / name).write_text(content, encoding="utf-8")))


def config(**values: Any) -> Callable[[SmallRun], Changes]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return model(change)


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[SmallRun], Changes]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return model(rewrite)


def flags(**changes: str) -> Callable[[SmallRun], Changes]:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return lambda _bench: named


def void(_result: object) -> None:
    """For a function that has to return nothing."""


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING][5, 3] = torch.nan


def quantised(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[TIED_HEAD] = tensors[EMBEDDING] * 1.01


def missing_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    index = {name: f"model-{place % 2 + 1}.safetensors" for place, name in enumerate(tensors)}
    (folder / "model.safetensors").unlink()
    save_file(
        {name: tensor for name, tensor in tensors.items() if index[name] == "model-1.safetensors"}, folder / "model-1.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def larger_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found["added_tokens"].append({**found["added_tokens"][0], "id": 1024, "content": "<|beyond|>"})
    file.write_text(json.dumps(found), encoding="utf-8")


def template_of_roles(small_run: SmallRun) -> Changes:
    rows = [question(number, "Ghazni", "Laos") for number in range(2)]
    for row in rows:
        row["prompt"].insert(0, {"role": "system", "content": "Search."})
    write_rows(small_run.train, rows)
    return model(lambda folder: (folder / "chat_template.jinja").unlink())(small_run)


def long_prompts(small_run: SmallRun) -> Changes:
    write_rows(small_run.train, [question(number, "Ghazni " * 100, "Laos") for number in range(2)])
    return {"rollout.max_context": "64"}


def wordless_corpus(small_run: SmallRun) -> Changes:
    write_rows(small_run.corpus, [{"id": str(number), "contents": "… ?!\n—"} for number in range(3)])
    return {}


def empty_corpus_row(small_run: SmallRun) -> Changes:
    write_rows(small_run.corpus, [{"id": "1", "contents": "A\na"}, {"id": "2", "contents": ""}])
    return {}


def corpus_row_without_contents(small_run: SmallRun) -> Changes:
    write_rows(small_run.corpus, [{"id": "1", "contents": "A\na"}, {"id": "2"}])
    return {}


def question_without_answer(small_run: SmallRun) -> Changes:
    write_rows(small_run.train, [question(0, "Ghazni", "Laos"), question(1, "Mubi", None)])
    return {}


def same_port(small_run: SmallRun) -> Changes:
    return {
        "retriever.listen": small_run.keys["broker.address"].replace("127.0.0.1", "0.0.0.0"),
        "security.insecure_network": "true",
    }


def trainers_port(small_run: SmallRun) -> Changes:
    port = int(small_run.keys["learner.metrics"].rpartition(":")[2])
    return {"learner.listen": f"127.0.0.1:{port + 1}"}


def below_a_file(small_run: SmallRun) -> Changes:
    (small_run.folder / "file").touch()
    return {"run.dir": str(small_run.folder / "file" / "run")}


def dangling_link(small_run: SmallRun) -> Changes:
    (small_run.folder / "link").symlink_to("/nonexistent/run")
    return {"run.dir": str(small_run.folder / "link")}


RESTORE = "restore it from the model's source"
PORT = "has port 0, and the other processes would not know which that is; give a number"
FAULTS = (
    PreparedFault("tokenizer beyond the embedding", model(larger_tokenizer), r"has the id 1024 .* resize its embeddings"),
    PreparedFault(
        "no config.json",
        model(lambda folder: (folder / "config.json").unlink()),
        r"model cannot be used: it has no config\.json; give",
    ),
    PreparedFault(
        "no tokenizer", model(lambda folder: (folder / "tokenizer.json").unlink()), "has no tokenizer .* save it beside the model"
    ),
    PreparedFault(
        "template that raises",
        text("chat_template.jinja", "{{ raise_exception('only agents') }}"),
        "only agents.*fix it or the data",
    ),
    PreparedFault(
        "template that is none", text("chat_template.jinja", "{% for m in %}"), "chat template fails .* fix it or the data"
    ),
    PreparedFault(
        "template without the messages",
        text("chat_template.jinja", "<|user|>Hello<|end|>"),
        "renders all .* prompts of data.train that were tried alike, .* fix it",
    ),
    PreparedFault(
        "code beside the model",
        config(model_type="other", auto_map={"AutoConfig": "other.Config"}),
        "has model_type 'other'; the embedded engine runs .*; use SGLang",
    ),
    PreparedFault(
        "roles without a template",
        template_of_roles,
        "no chat template, and prompts of data.train have several roles.*save chat_temp",
    ),
    PreparedFault(
        "prompts beyond the context",
        long_prompts,
        "None of the 2 prompts of data.train .* raise it, or shorten",
    ),
    PreparedFault(
        "context beyond the positions", flags(rollout__max_context="2048"), "allows 1024 positions .* lower the context"
    ),
    PreparedFault("missing shard", model(missing_shard), r"model-2\.safetensors, one of 2 .* does not exist; save the model"),
    PreparedFault("weights cut short", model(cut), r"model\.safetensors cannot be read .* restore it from where it came"),
    PreparedFault("quantised weights", weights(quantised), r"quantised weights \(.* is I8\).* give the model in bfloat16"),
    PreparedFault(
        "quantisation in the config",
        config(quantization_config={"quant_method": "gptq"}),
        r"quantised \(gptq\).* give the model in bf",
    ),
    PreparedFault("weights that are not finite", weights(not_finite), r"embed_tokens\.weight in .* not finite; restore it"),
    PreparedFault("tied config, another head", weights(other_head), r"unlike model\.embed_tokens\.weight.* set that to false"),
    PreparedFault("untied config, no head", config(tie_word_embeddings=False), r"has no lm_head\.weight.* set that to true"),
    PreparedFault(
        "missing tensors",
        weights(lambda t: void(t.pop("model.norm.weight"))),
        "lacks 1 tensors of the model, model.norm.weight first",
    ),
    PreparedFault(
        "another shape", config(intermediate_size=512), "has shape .*, the model needs .*; publish weights of the same model"
    ),
    PreparedFault(
        "empty generation_config.json",
        text("generation_config.json", ""),
        f"generation_config.json is not valid JSON .*{RESTORE}",
    ),
    PreparedFault(
        "list as generation_config.json",
        text("generation_config.json", "[1]"),
        f"generation_config.json is not a JSON object; {RESTORE}",
    ),
    PreparedFault(
        "eos as a name",
        text("generation_config.json", '{"eos_token_id": "<|end|>"}'),
        "has eos_token_id '<|end|>', .* give their ids",
    ),
    PreparedFault("config.json of wrong types", config(rms_norm_eps="small"), f"rms_norm_eps.*{RESTORE}"),
    PreparedFault("config.json with NaN", config(rms_norm_eps=float("nan")), f"NaN is the value of a key.*{RESTORE}"),
    PreparedFault("config.json that is a list", text("config.json", "[]"), f"config.json is not a JSON object; {RESTORE}"),
    PreparedFault("sliding window", config(layer_types=["sliding_attention"] * 4), "sliding.* use SGLang for this model"),
    PreparedFault("corpus without words", wordless_corpus, "has no word in any of its 3 documents; no query could match"),
    PreparedFault("empty corpus row", empty_corpus_row, "line 2: contents: .*each row is"),
    PreparedFault("corpus row without contents", corpus_row_without_contents, "corpus.*line 2: contents: .*each row is"),
    PreparedFault("question without an answer", question_without_answer, r"train\.jsonl.* row 2"),
    PreparedFault(
        "one leaf a question",
        flags(rollout__trees="1", rollout__expansions="0"),
        "every advantage would be 0; raise rollout.trees",
    ),
    PreparedFault(
        "leaves beyond any group",
        flags(rollout__rounds="4000"),
        "make 16002 leaves a question, and 4096 are the most; lower one of them",
    ),
    PreparedFault(
        "an address without a port", flags(broker__address="localhost"), "broker.address = 'localhost' is not an address"
    ),
    PreparedFault("a URL for an address", flags(broker__address="mqtt://127.0.0.1:1883"), "is not an address; write HOST:PORT"),
    PreparedFault(
        "max_running beyond memory",
        flags(engine__max_running="1000000"),
        "need .* GiB of memory.* lower engine.max_running to at most",
    ),
    PreparedFault(
        "cache beyond memory",
        flags(engine__cache_tokens="1000000000"),
        "need .* GiB of memory.* lower rollout.max_context or engine",
    ),
    PreparedFault("port 0 of the broker", flags(broker__address="127.0.0.1:0"), f"broker.address = 127.0.0.1:0 {PORT}"),
    PreparedFault("port 0 of the retriever", flags(retriever__listen="127.0.0.1:0"), f"retriever.listen = 127.0.0.1:0 {PORT}"),
    PreparedFault("port 0 of the learner", flags(learner__listen="127.0.0.1:0"), f"learner.listen = 127.0.0.1:0 {PORT}"),
    PreparedFault(
        "one port for two", same_port, "broker.address and retriever.listen are .*on the same port; give one of them another port"
    ),
    PreparedFault(
        "the trainer's metrics port", trainers_port, r"learner\.listen and learner\.metrics .*; give one of them another port"
    ),
    PreparedFault(
        "IPv6 without brackets", flags(learner__listen="::1:50051"), r"is an IPv6 address without brackets; write \[HOST\]:PORT"
    ),
    PreparedFault("run.dir below a file", below_a_file, "run.dir = .* lies below .*, which is a file; give a directory"),
    PreparedFault("run.dir a dangling link", dangling_link, "leads to the link .* whose target does not exist; fix it"),
    PreparedFault(
        "run.dir that takes no file", flags(run__dir="/proc/run"), "run.dir = /proc/run cannot be written to .*; choose another"
    ),
    PreparedFault(
        "run.dir with too long a name", flags(run__dir="/tmp/" + "x" * 300), "cannot be made .*; choose another directory"
    ),
)


def children_seconds() -> float:
    """CPU time of all processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    """Print a table: what `treegrpo up` does about each fault, and how long it takes to say so."""
    failed = 0
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            small_run = SmallRun(Path(folder))
            small_run.keys.update(fault.prepare(small_run))
            began, computed = time.perf_counter(), children_seconds()
            result = treegrpo("up", *small_run.flags())
            seconds, computed = time.perf_counter() - began, children_seconds() - computed
            good = result.code == 2 and re.search(fault.says, result.sentence) and seconds < LIMIT_SECONDS and not result.left
        failed += not good
        print(
            f"{'ok' if good else 'FAULT':6}{fault.name:34}code {result.code}{seconds:6.1f} s{computed:6.1f} s of CPU  "
            f"{result.sentence[:100]}",
            flush=True,
        )
    print(f"{len(FAULTS) - failed} of {len(FAULTS)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
