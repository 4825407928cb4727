"""What tests/eval/tasks/digits.yaml names."""

import io
import re

from PIL import Image


def images(doc):
    return [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in doc["images"]]


def question(doc):
    return doc["prompt"][-1]["content"].replace("<image>", "")


def answer(doc):
    return doc["reward_model"]["ground_truth"]


def judge(doc, results):
    return {"exact_match": float(results[0] == answer(doc))}


def judge_element(doc, results):
    element = re.fullmatch("<answer>(.*)</answer>", results[0])
    return {"exact_match": float(bool(element) and element[1] == answer(doc)), "format_score": 0.0}
