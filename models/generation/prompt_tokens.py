"""Counts the tokens of a prompt beyond what a pipeline's text encoder takes; negative if there is room left.

One function per pipeline, for `FAMILIES` in `models/generation/families.py`. Each counts as its classes do it in
diffusers 0.42, with the words that they put around a prompt.
"""

import inspect
from typing import Any

from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input


def truncated_by_clip(pipeline: Any, prompt: str) -> int:
    """Stable Diffusion and SDXL."""
    return len(pipeline.tokenizer(prompt).input_ids) - int(pipeline.tokenizer.model_max_length)


def truncated_by_t5(pipeline: Any, prompt: str) -> int:
    """Stable Diffusion 3 and FLUX.1: of T5, which has the most room."""
    tokenizer = pipeline.tokenizer_3 if hasattr(pipeline, "tokenizer_3") else pipeline.tokenizer_2
    if tokenizer is None:  # optional in Stable Diffusion 3
        return truncated_by_clip(pipeline, prompt)
    return len(tokenizer(prompt).input_ids) - _max_tokens(pipeline)


def truncated_by_mistral(pipeline: Any, prompt: str) -> int:
    """FLUX.2."""
    messages = format_input([prompt], system_message=pipeline.system_message)
    inputs = pipeline.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    return len(inputs["input_ids"][0]) - _max_tokens(pipeline)


def truncated_by_qwen3(pipeline: Any, prompt: str) -> int:
    """FLUX.2 Klein and Z-Image."""
    # FLUX.2 Klein turns thinking off, which costs four tokens more than in Z-Image.
    thinking = not isinstance(pipeline, Flux2KleinPipeline)
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    return len(pipeline.tokenizer(text).input_ids) - _max_tokens(pipeline)


def truncated_by_qwen25(pipeline: Any, prompt: str) -> int:
    """Qwen-Image."""
    text = pipeline.prompt_template_encode.format(prompt)
    before = int(pipeline.prompt_template_encode_start_idx)  # dropped before the rest is cut to length
    return len(pipeline.tokenizer(text).input_ids) - before - _max_tokens(pipeline)


def truncated_by_gemma(pipeline: Any, prompt: str) -> int:
    """Sana and Sana-Sprint, which count their instruction in."""
    if own := own_prompt_length(pipeline):
        return len(pipeline.tokenizer(prompt.lower().strip()).input_ids) - int(own["max_sequence_length"])
    lines = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(lines)  # before the prompt; its tokens are added to the limit, less two
    limit = len(pipeline.tokenizer(instruction).input_ids) + _max_tokens(pipeline) - 2
    return len(pipeline.tokenizer(instruction + prompt.lower().strip()).input_ids) - limit


def truncated_by_prx(pipeline: Any, prompt: str) -> int:
    """PRX, which cleans a prompt first."""
    return truncated_by_clip(pipeline, pipeline.text_preprocessor.clean_text(prompt))


def truncated_by_none(pipeline: Any, prompt: str) -> int:
    """Qwen-Image 2.1, which takes prompts of any length."""
    return 0


def _max_tokens(pipeline: Any) -> int:
    return int(inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default)


def own_prompt_length(pipeline: Any) -> dict[str, Any]:
    """Arguments for a Sana with a tokenizer for shorter prompts than Gemma's: of its length, without an instruction.

    The instruction that Sana puts before a prompt has hundreds of tokens; a model that takes fewer never saw it.
    """
    own_tokens = int(pipeline.tokenizer.model_max_length)
    if own_tokens >= _max_tokens(pipeline):
        return {}
    return {"max_sequence_length": own_tokens, "complex_human_instruction": None}
