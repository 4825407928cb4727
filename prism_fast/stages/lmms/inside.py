"""The half of `eval --lmms` that runs in lmms-eval's process: ``python -m prism_fast.stages.lmms.inside JOB``.

lmms-eval is not changed: its tasks get one filter more in front of their own, its models of Qwen3-VL are subclassed
where they would run code from a model's folder or show a policy other prompts and pixels than it was trained with, and
its cache of responses is written to more often. Those names are not all public, so versions are pinned
(`benchmarks.LMMS_EVAL`).

JOB is a JSON file that `launch.py` writes. stdout has one JSON object a line: ``{"finished": task}``, or
``{"fault": one line}`` at the end; whatever else is printed goes to stderr. The process ends when its stdin does.
"""

# lmms-eval is in the environment of those who use it.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prism_fast.files import replacing
from prism_fast.reward import answer_element

BLOCK = 256  # responses after which the cache keeps them: a task that is interrupted goes on behind its last block
PROMPTS = "prism_fast"  # as a model's name for its own prompts: none, so that tasks ask by their default ones


# ---- what is done to messages and responses; needs no lmms-eval


def answer_of(response: str, *, whole: bool = False, tagged: bool = False) -> str:
    """What a task judges of a response: what its one answer element holds, or nothing where there is not exactly one.

    ``whole``: then the response as it is. ``tagged``: inside the element, for tasks that look for it themselves.
    """
    found = answer_element(response)
    if found is None:
        return response if whole else ""
    return f"<answer>{found}</answer>" if tagged else found


def with_system(messages: list[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    """Chat messages with ``prompt`` as their only system turn; as they are where it is None."""
    if prompt is None:
        return messages
    turn = {"role": "system", "content": [{"type": "text", "text": prompt}]}
    return [turn, *(message for message in messages if message["role"] != "system")]


def root_cause(error: BaseException) -> BaseException:
    """The error behind tenacity's, which says only that it has tried often."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else None
    return error if cause is None or cause is error else root_cause(cause)


def one_line(error: BaseException) -> str:
    cause = root_cause(error)
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__


class Fault(Exception):
    """One line for the user."""


# ---- tasks


class Answers:
    """A filter of lmms-eval's: of each response, what is judged. Counts what has no answer."""

    def __init__(self, *, whole: bool, tagged: bool):
        self.whole, self.tagged = whole, tagged
        self.responses = self.without = 0

    def apply(self, resps: Iterable[Any], docs: Any) -> list[list[str]]:
        found = [[str(text) for text in ([each] if isinstance(each, str) else each)] for each in resps]
        texts = [text for each in found for text in each]
        self.responses += len(texts)
        self.without += sum(answer_element(text) is None for text in texts)
        return [[answer_of(text, whole=self.whole, tagged=self.tagged) for text in each] for each in found]


def leaves(tasks: Any) -> Iterator[Any]:
    """The tasks of a tree of groups."""
    for task in tasks.values():
        if isinstance(task, dict):
            yield from leaves(task)
        else:
            yield task


def scores_format(task: Any) -> bool:
    """Whether a task looks for the answer element itself, as those do whose responses it also scores for their form."""
    return any(metric.get("metric") == "format_score" for metric in task.config.metric_list or ())


def manager_class() -> type:
    from lmms_eval.tasks import TaskManager

    class Tasks(TaskManager):
        """lmms-eval's tasks, each with `Answers` in front of its filters."""

        whole = False

        def load_task_or_group(self, task_list=None, task_type="simple"):
            found = super().load_task_or_group(task_list, task_type)
            self.answers = []
            for task in leaves(found):
                for ensemble in task._filters:
                    self.answers.append(Answers(whole=self.whole, tagged=scores_format(task)))
                    ensemble.filters.insert(0, self.answers[-1])
            return found

        def datasets(self, name: str) -> set[str]:
            """The data sets that a task or the tasks of a group read."""
            config = self._get_config(name)
            parts = config.get("task") if isinstance(config.get("task"), list) else ()
            names = [part if isinstance(part, str) else part.get("task") for part in parts]
            own = {str(config["dataset_path"])} if "dataset_path" in config else set()
            return own.union(*map(self.datasets, names))

    return Tasks


def managers(job: dict[str, Any]) -> dict[str, Any]:
    """Who has each task of the job: the user's folder, or lmms-eval. Raises Fault for a task that neither has."""
    cls, found = manager_class(), {}
    if job["include"]:
        own = cls("INFO", include_path=job["include"], include_defaults=False, model_name=PROMPTS)
        found = {task: own for task in job["tasks"] if task in own.all_tasks}
    if found.keys() != set(job["tasks"]):
        theirs = cls("INFO", model_name=PROMPTS)
        for task in job["tasks"]:
            if task not in found and task not in theirs.all_tasks:
                raise Fault(f"{task}: no such task in lmms-eval {job['lmms_eval']}" + _in_folder(job["include"]))
            found.setdefault(task, theirs)
    for manager in found.values():
        manager.whole = job["no_answer"] == "whole"
    return found


def _in_folder(include: str | None) -> str:
    return f", nor in {include}" if include else "; a task of your own: include=FOLDER"


def try_tasks(found: dict[str, Any]) -> None:
    """Loads every task's data before a model is opened. Raises Fault, naming the data that is missing."""
    from lmms_eval.tasks import get_task_dict

    for task, manager in found.items():
        try:
            get_task_dict([task], manager, "chat")
        except Exception as error:
            data = ", ".join(sorted(manager.datasets(task)))
            raise Fault(
                f"{task}: its data set {data} cannot be read ({one_line(error)}); without a network, download it "
                "elsewhere and set HF_HOME to the folder that holds it"
            ) from error


# ---- models


def open_model(job: dict[str, Any]) -> Any:
    return (_vllm if job["engine"] == "vllm" else _transformers)(job)


def _transformers(job: dict[str, Any]) -> Any:
    import torch
    from lmms_eval.models.chat import qwen3_vl as chat
    from lmms_eval.models.simple import qwen3_vl as simple
    from transformers import AutoImageProcessor, Qwen3VLForConditionalGeneration

    gpu = torch.cuda.is_available()
    dtype = {"auto": "bfloat16" if gpu else "float32"}.get(job["dtype"], job["dtype"])

    class Weights:
        """In place of a lookup that runs code which a model's folder brings, and of weights in bfloat16 alone."""

        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            options |= {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
            options["attn_implementation"] = "sdpa"  # the folder's own could name code from elsewhere
            return Qwen3VLForConditionalGeneration.from_pretrained(path, **options)

    class Policy(_kept(job, chat.Qwen3_VL)):
        def _apply_chat_template(self, batched_messages, **kwargs):
            # The first turn is the class's own system prompt.
            messages = [with_system(each[1:], job["system_prompt"]) for each in batched_messages]
            return super()._apply_chat_template(messages, **kwargs)

    simple._resolve_model_class = lambda pretrained, is_moe: (Weights, "dtype")
    device = "cuda:0" if gpu else "cpu"
    own = AutoImageProcessor.from_pretrained(job["policy"], local_files_only=True, trust_remote_code=False)
    bounds = {"min_pixels": own.size["shortest_edge"], "max_pixels": own.size["longest_edge"]}
    chat.process_vision_info = _as_trained(bounds, own.patch_size, chat.process_vision_info)
    return Policy(job["policy"], device=device, device_map=device, batch_size=job["batch_size"], **bounds)


def _as_trained(bounds: dict[str, int], patch_size: int, theirs: Any) -> Any:
    """qwen_vl_utils' reading of images, at the sizes and patches that the policy was trained with: lmms-eval has bounds
    of its own, and its chat models pass none for images."""

    def process_vision_info(messages: Any, **options: Any) -> Any:
        for message in (message for conversation in messages for message in conversation):
            for part in message["content"]:
                if part.get("type") == "image":
                    part.update(bounds)
        return theirs(messages, **{**options, "image_patch_size": patch_size})

    return process_vision_info


def _vllm(job: dict[str, Any]) -> Any:
    from lmms_eval.models.chat.vllm import VLLM

    class Policy(_kept(job, VLLM)):
        def make_one_request(self, request):
            messages, params = super().make_one_request(request)
            return with_system(messages, job["system_prompt"]), params

    settings = {key: job["vllm"][key] for key in ("dtype", "gpu_memory_utilization", "enforce_eager")}
    if job["vllm"]["max_model_len"]:
        settings["max_model_len"] = job["vllm"]["max_model_len"]
    return Policy(
        job["policy"],
        data_parallel_size=job["processes"],
        batch_size=job["batch_size"],
        trust_remote_code=False,
        max_new_tokens=job["max_response_tokens"],
        **settings,
    )


def _kept(job: dict[str, Any], cls: type) -> type:
    class Kept(cls):
        def clean(self):
            """The weights stay: more tasks follow."""

        def __repr__(self):  # what lmms-eval's cache takes for the model's identity
            return f"prism_fast {job['identity']}"

    return Kept


# ---- a job


def run(job: dict[str, Any], emit: Any) -> None:
    from lmms_eval import evaluator
    from lmms_eval.caching.response_cache import ResponseCache

    class Blocks(ResponseCache):
        """lmms-eval keeps responses when all of a task are there; here, after every block of them."""

        def execute(self, lm, reqtype, requests):
            blocks = [requests[i : i + BLOCK] for i in range(0, len(requests), BLOCK)]
            return [response for block in blocks for response in super(Blocks, self).execute(lm, reqtype, block)]

    evaluator.ResponseCache = Blocks
    out, found = Path(job["out"]), managers(job)
    try_tasks(found)
    model = open_model(job)
    sampling = f"do_sample={job['temperature'] > 0},temperature={job['temperature']},top_p={job['top_p']}"
    for task, manager in found.items():
        began = time.time()
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            batch_size=job["batch_size"],
            use_cache=str(out / "cache" / task),
            limit=job["limit"],
            gen_kwargs=f"max_new_tokens={job['max_response_tokens']},num_beams=1,{sampling}",
            cli_args=Namespace(output_path=str(out / task), process_with_media=False, reasoning_tags=None),
        )
        if results is not None:  # else another process has them
            about = {"asked": job["asked"], "seconds": round(time.time() - began, 1)}
            write(out, task, about, results, manager.answers)
            emit({"finished": task})


def write(out: Path, task: str, about: dict[str, Any], results: dict[str, Any], answers: list[Answers]) -> None:
    """TASK.samples.jsonl, then TASK.json: where that is there, the task is finished."""
    with replacing(out / f"{task}.samples.jsonl") as aside, open(aside, "w", encoding="utf-8") as lines:
        for part, samples in results.pop("samples", {}).items():
            for sample in samples:
                kept = {key: value for key, value in sample.items() if key not in ("doc", "arguments", "input_media")}
                lines.write(json.dumps({"task": part, **kept}, default=_plain, ensure_ascii=False) + "\n")
    first = [each for each in answers if each.responses]
    counts = {"responses": sum(each.responses for each in first), "without": sum(each.without for each in first)}
    kept = {key: results[key] for key in ("results", "groups", "n-samples", "versions") if key in results}
    with replacing(out / f"{task}.json") as aside:
        aside.write_text(json.dumps({**about, "answers": counts, **kept}, default=_plain, indent=1), encoding="utf-8")


def _plain(value: Any) -> Any:
    """numpy's scalars as numbers, the rest as text."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else str(value)


def _end_with_stdin() -> None:
    """Whoever started this process holds the other end, and may be killed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def main(file: str) -> int:
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def emit(event: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            events.write(json.dumps(event) + "\n")
            events.flush()

    try:
        run(json.loads(Path(file).read_text(encoding="utf-8")), emit)
    except Fault as fault:
        emit({"fault": str(fault)})
        return 2
    except Exception as error:
        emit({"fault": one_line(error)})
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
