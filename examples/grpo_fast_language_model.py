"""GRPO on a model that comes with its engine, in the calls that Unsloth's users know.

    python examples/grpo_fast_language_model.py

It ends with `fast_generate`: answers with the adapter that was trained, and without.
"""
# ruff: noqa: E402  (PatchFastRL comes before TRL)

import argparse
import os
import tempfile

os.environ.setdefault("UNSLOTH_VLLM_STANDBY", "1")  # before the engine is built

from patchfastrl import FastLanguageModel, PatchFastRL, vLLMSamplingParams

PatchFastRL("GRPO", FastLanguageModel)

import torch
from arithmetic import LONGEST_ANSWER, correct, make_checkpoint, problems
from trl import GRPOConfig, GRPOTrainer
from vllm import SamplingParams

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or hub name (default: a tiny model, made and warmed up on the spot)")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model or make_checkpoint(folder, options.seed),
        max_seq_length=64,
        load_in_4bit=False,
        fast_inference=True,
        gpu_memory_utilization=0.3,
        max_lora_rank=16,
        random_state=options.seed,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, random_state=options.seed)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=correct,
        train_dataset=problems(),
        args=GRPOConfig(
            output_dir=f"{folder}/trainer",
            seed=options.seed,
            max_steps=options.steps,
            learning_rate=3e-3,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=LONGEST_ANSWER,
            vllm_sampling_params=vLLMSamplingParams(min_p=0.01),
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()

    questions = ["7+12=", "5+14=", "3+4="]
    greedy = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER)
    trained = model.fast_generate(questions, sampling_params=greedy, use_tqdm=False)
    base = model.fast_generate(questions, sampling_params=greedy, lora_request=None, use_tqdm=False)
    for question, after, before in zip(questions, trained, base, strict=True):
        print(f"{question}{after.outputs[0].text}   (before training: {before.outputs[0].text})")
