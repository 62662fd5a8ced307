import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

IGNORE = -100


def load_model(cfg):
    torch.manual_seed(cfg["seed"])
    model = LlavaForConditionalGeneration.from_pretrained(cfg["model"])
    rank = cfg["rank"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(model, lora)


def load_processor(cfg):
    return AutoProcessor.from_pretrained(cfg["model"])


def get_parameters(model):
    return get_peft_model_state_dict(model)


def set_parameters(model, state):
    set_peft_model_state_dict(model, state)


def sites(cfg):
    return sorted((Path(cfg["data"]) / "sites").iterdir())


def load_rows(folder, split):
    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row | {"image": folder / "images" / row["image"]} for row in rows]


def to_batch(processor, rows, with_answer):
    prompts, images = [], []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        turn = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
        images.append(Image.open(row["image"]).convert("RGB"))
    end = processor.tokenizer.eos_token
    texts = (
        [f"{p} {row['answer']} {end}" for p, row in zip(prompts, rows, strict=True)]
        if with_answer
        else prompts
    )
    processor.tokenizer.padding_side = "right" if with_answer else "left"
    given = {"images": images, "return_tensors": "pt", "padding": True, "add_special_tokens": False}
    batch = processor(text=texts, **given)
    batch.pop("token_type_ids", None)
    if with_answer:
        lengths = processor(text=prompts, **given)["attention_mask"].sum(dim=1)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = IGNORE
        for row, length in enumerate(lengths):
            labels[row, :length] = IGNORE
        batch["labels"] = labels
    return batch


def train(model, processor, rows, cfg, seed):
    chosen = random.Random(seed).sample(rows, min(cfg["samples"], len(rows)))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=cfg["learning-rate"])
    model.train()
    losses = []
    for start in range(0, len(chosen), cfg["batch-size"]):
        loss = model(**to_batch(processor, chosen[start : start + cfg["batch-size"]], True)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses), len(chosen)


@torch.no_grad()
def test(model, processor, rows):
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        batch = to_batch(processor, part, False)
        made = model.generate(**batch, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == row["answer"] for a, row in zip(answers, part, strict=True))
    return right / len(rows)
