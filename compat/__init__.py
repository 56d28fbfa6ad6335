"""What differs between releases of TRL, vLLM, transformers and peft, one small file per difference."""
