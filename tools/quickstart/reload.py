"""`python -m tools.quickstart.reload FOLDER`: an exported model, as somebody meets it who has only `transformers`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

QUESTIONS = ("What is 478+356?", "What is 999+111?", "What is 250+417?")


def answers(folder: Path, questions: Sequence[str]) -> list[str]:
    """Greedy answers of the model in `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        texts.append(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each question with the model's answer."""
    parser = argparse.ArgumentParser(description="load an exported model with transformers and ask it three questions")
    parser.add_argument("folder", type=Path, help="a Hugging Face model folder")
    folder = parser.parse_args(arguments).folder
    for question, answer in zip(QUESTIONS, answers(folder, QUESTIONS), strict=True):
        print(f"{question}\n    " + answer.replace("\n", "\n    "))


if __name__ == "__main__":
    main()
