"""GRPO with LoRA: a plain TRL script.

    python examples/grpo_lora.py              # stock TRL
    patchfastrl run examples/grpo_lora.py     # the same script on an engine that shares the model's weights

Or put `from patchfastrl import PatchFastRL; PatchFastRL()` above the imports. Add UNSLOTH_VLLM_STANDBY=1 to the
environment to release the engine's KV cache while training.
"""

import argparse
import tempfile

import torch
from arithmetic import LONGEST_ANSWER, correct, make_checkpoint, problems
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder or hub name (default: a tiny model, made and warmed up on the spot)")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=options.model or make_checkpoint(folder, options.seed),
        reward_funcs=correct,
        train_dataset=problems(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        args=GRPOConfig(
            output_dir=f"{folder}/trainer",
            seed=options.seed,
            max_steps=options.steps,
            learning_rate=3e-3,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=LONGEST_ANSWER,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
